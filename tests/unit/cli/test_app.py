import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
from diffusers import DiffusionPipeline
from tests.processors import load_without_torchvision
from tests.unit.cli.invoking import assert_one_line_error, run_cli

import flowroll.serving
from flowroll.checkpoints import shapes_checkpoint
from flowroll.cli.app import COMMANDS
from flowroll.cli.serve import serve
from flowroll.engine import AdapterLimits, BatchLimits, Limits
from flowroll.families import FAMILIES
from flowroll.serving import ServerConfig
from flowroll.types import Layout


def test_help_names_every_command():
    result = run_cli("--help")
    assert result.exit_code == 0
    for command in ("serve", "generate", "rollout", "inspect", "parity", "make-checkpoint"):
        assert command in result.stdout


def test_an_unknown_command_is_a_usage_error():
    assert run_cli("paint").exit_code == 2


def test_a_users_mistake_ends_the_process_with_status_1_and_no_traceback(tmp_path):
    command = [sys.executable, "-c", "from flowroll.cli import app; app()", "inspect", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("family", "pipeline"), [(name, family.pipeline_classes[0]) for name, family in FAMILIES.items()])
def test_make_checkpoint_makes_a_checkpoint_of_the_family(family, pipeline, tmp_path):
    load_without_torchvision()
    result = run_cli("make-checkpoint", family, tmp_path / "made")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "made") in result.stdout
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "made", local_files_only=True)).__name__ == pipeline


def test_make_checkpoint_takes_a_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_cli("make-checkpoint", "z_image", tmp_path / name, "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("words", [("z_image", "out", "--size", "huge"), ("z_image", "out", "--seed", "-1")])
def test_make_checkpoint_refuses_what_it_does_not_know(words):
    assert run_cli("make-checkpoint", *words).exit_code == 2
    assert_one_line_error(run_cli("make-checkpoint", "sdxl", "out"), f"family must be one of {', '.join(FAMILIES)}, got sdxl")


def test_make_checkpoint_never_uses_a_folder_again(tmp_path):
    (tmp_path / "file").touch()
    assert_one_line_error(run_cli("make-checkpoint", "z_image", tmp_path / "file"), "directory must be a folder or free")
    assert_one_line_error(run_cli("make-checkpoint", "z_image", tmp_path), "directory must be new or empty, got ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    assert run_cli("make-checkpoint", "z_image", tmp_path / "empty").exit_code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_short_help(name):
    words = (name, "serve") if name == "bench" else (name,)
    assert run_cli(*words, "-h").stdout == run_cli(*words, "--help").stdout != ""


def test_help_shows_defaults_and_one_url_for_all():
    def shown(*words):
        # Lines are broken anywhere.
        return "".join(run_cli(*words, "--help").stdout.split())

    for words in (("rollout",), ("bench", "serve"), ("top",)):
        assert "[default:http://127.0.0.1:30000]" in shown(*words)
    for default in ("(no-rollout)", "(sde)", "(0.7)", "(no-rollout-debug-mode)", "(cuda)", "flowroll-out"):
        assert f"[default:{default}]" in shown("generate")
    assert "[default:(rollout)]" in shown("rollout")


@pytest.fixture
def served(monkeypatch):
    """The configurations that `flowroll serve` was started with."""
    configs = []
    monkeypatch.setattr(flowroll.serving, "serve", configs.append)
    # Somebody may listen on the default port of this machine.
    monkeypatch.setattr("flowroll.cli.serve.check_address", lambda host, port: None)
    return configs


@pytest.fixture
def folder(tmp_path):
    """What looks like a checkpoint from outside."""
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


def test_serve_without_flags_is_the_servers_own_configuration(served, folder):
    result = run_cli("serve", folder)
    assert result.exit_code == 0, result.output
    assert served == [ServerConfig(model=str(folder))]


@pytest.mark.parametrize(("words", "family"), [((), "z_image"), (("shapes-qwen_image",), "qwen_image")])
def test_serve_has_checkpoints_of_its_own(served, words, family):
    assert run_cli("serve", *words).exit_code == 0
    assert served == [ServerConfig(model=str(shapes_checkpoint(family)))]


def test_every_serve_flag_reaches_the_configuration(served, folder):
    words = (
        *("--host", "0.0.0.0", "--port", 8000, "--variant", "turbo", "--dtype", "bfloat16", "--device", "cpu"),
        *("--api-key", "sesame", "--wire-format", "msgpack", "--wire-dialect", "sglang", "--max-pixels", 4096),
        *("--max-steps", 20, "--max-outputs", 3, "--max-queue", 2),
        *("--max-batch-samples", 5, "--max-running-samples", 9, "--max-running-pixels", 70_000),
        *("--weights-root", folder, "--weights-root", "/"),
        *("--sp", 2, "--tp", 4, "--cfg-parallel", "--rank-timeout-s", 7.5),
        *("--max-answer-bytes", 5000, "--max-body-bytes", 1000, "--max-scores", 9, "--max-score-body-bytes", 2000),
        *("--max-adapters", 3, "--max-adapter-bytes", 4000),
        *("--max-images", 4, "--max-image-pixels", 5, "--max-image-bytes", 6, "--max-hashed-bytes", 7),
        *("--max-weights-body-bytes", 3000, "--weights-idle-s", 2.5, "--allow-pickle-weights", "--lora-merge-mode", "merge"),
        *("--max-unsent-bytes", 6000, "--min-send-bytes-per-s", 70, "--allowed-host", "a", "--allowed-host", "b"),
        *("--grace-s", 1.5, "--log-level", "warning"),
    )
    result = run_cli("serve", folder, *words)
    assert result.exit_code == 0, result.output
    assert served == [
        ServerConfig(
            model=str(folder),
            host="0.0.0.0",
            port=8000,
            variant="turbo",
            dtype="bfloat16",
            device="cpu",
            api_key="sesame",
            wire_format="msgpack",
            wire_dialect="sglang",
            limits=Limits(
                max_pixels=4096,
                max_steps=20,
                max_outputs=3,
                max_answer_bytes=5000,
                max_scores=9,
                max_images=4,
                max_image_pixels=5,
                max_image_bytes=6,
                max_hashed_bytes=7,
            ),
            batching=BatchLimits(max_batch_samples=5, max_running_samples=9, max_running_pixels=70_000),
            adapter_limits=AdapterLimits(max_adapters=3, max_adapter_bytes=4000),
            layout=Layout(cfg_parallel=True, sp=2, tp=4),
            rank_timeout_s=7.5,
            weights_roots=(str(folder), "/"),
            max_queue=2,
            max_body_bytes=1000,
            max_score_body_bytes=2000,
            max_weights_body_bytes=3000,
            weights_idle_s=2.5,
            max_unsent_bytes=6000,
            min_send_bytes_per_s=70,
            allowed_hosts=("a", "b"),
            allow_pickle_weights=True,
            lora_merge_mode="merge",
            grace_s=1.5,
            log_level="warning",
        )
    ]


def test_the_flags_of_serve_are_the_fields_of_the_configuration():
    parts = {"limits": Limits, "adapter_limits": AdapterLimits, "layout": Layout, "batching": BatchLimits}
    configurable = {field.name for owner in (ServerConfig, *parts.values()) for field in fields(owner)} - parts.keys()
    assert set(inspect.signature(serve).parameters) == configurable


@pytest.mark.parametrize("words", [("--grace-s", -1), ("--max-body-bytes", 0), ("--log-level", "loud")])
def test_serve_refuses_flags_out_of_range(served, words, tmp_path):
    result = run_cli("serve", tmp_path, *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr
    assert served == []


def test_python_m_flowroll_is_the_command():
    done = subprocess.run([sys.executable, "-m", "flowroll", "--help"], check=True, capture_output=True, text=True)
    assert "Usage: flowroll [OPTIONS]" in done.stdout
    assert "make-checkpoint" in done.stdout


def test_serve_refuses_what_the_configuration_refuses(folder):
    assert_one_line_error(run_cli("serve", folder, "--port", 70_000), "port must lie in 0..65535, got 70000")


def test_serve_on_a_folder_that_is_no_checkpoint_ends_with_one_clear_line(tmp_path):
    # In a process of its own: the server sets the logging of its whole process.
    command = [sys.executable, "-c", "from flowroll.cli import app; app()", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {tmp_path} must be a diffusers checkpoint folder")
    assert "Traceback" not in done.stderr
