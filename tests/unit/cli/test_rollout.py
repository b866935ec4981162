import errno
import os
import socket

import pytest
from tests.blocking import BEYOND_THE_CLIENT, cli_without
from tests.factories import make_rollout
from tests.rollouts import assert_same_bits
from tests.serving.servers import HookedEngine, serving
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll.client import Client
from flowroll.engine.service import EngineService
from flowroll.errors import ServerConnectionError
from flowroll.wire.files import load_rollout

SMALL = ("--width", 64, "--height", 64, "--num-inference-steps", 2)
PROMPTS = ("a red fox", "三只猫", "a blue cow")


@pytest.fixture(scope="module")
def engine(qwen_checkpoint):
    with HookedEngine(qwen_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine):
    with EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as client:
        yield str(client.base_url)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def rollout(*words):
    return run_cli("rollout", *words)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_sample_of_every_prompt_becomes_a_file_with_its_record(url, prompts, tmp_path, engine):
    out = tmp_path / "deep" / "out"
    flags = ("--seed", 5, "--num-outputs-per-prompt", 2, "--return-dit-trajectory", "--return-denoising-env")
    result = rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    assert files_in(out) == [
        f"prompt-{number:05d}-sample-{index:02d}-seed-{5 + index}.safetensors" for number in (1, 2, 3) for index in (0, 1)
    ]
    assert "6 rollouts of 3 prompts" in result.stdout
    for number, prompt in enumerate(PROMPTS, start=1):
        expected = engine.rollout(
            prompt=prompt,
            seed=5,
            num_outputs_per_prompt=2,
            width=64,
            height=64,
            num_inference_steps=2,
            return_dit_trajectory=True,
            return_denoising_env=True,
        )
        for index, sample in enumerate(expected):
            saved = load_rollout(out / f"prompt-{number:05d}-sample-{index:02d}-seed-{5 + index}.safetensors")
            assert saved.prompt == prompt
            assert_same_bits(saved, sample)


def test_the_client_extra_is_enough_to_roll_out_and_to_watch(url, prompts, tmp_path):
    out = tmp_path / "out"
    done = cli_without(BEYOND_THE_CLIENT, "rollout", "--url", url, "--prompts", prompts, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert len(files_in(out)) == 3
    done = cli_without(BEYOND_THE_CLIENT, "top", "--url", url, "--once", "--interval-s", 0.1)
    assert done.returncode == 0, done.stderr
    load = ("--url", url, "--prompts", prompts, "--concurrency", 1, "--num-requests", 1, "--sizes", "64x64", "--steps", 2)
    done = cli_without(BEYOND_THE_CLIENT, "bench", "serve", *load, "--warmup", 0)
    assert done.returncode == 0, done.stderr


def test_progress_is_shown(url, prompts, tmp_path):
    result = rollout("--url", url, "--prompts", prompts, "--out", tmp_path / "out", *SMALL)
    assert "3/3" in result.stdout


@pytest.mark.parametrize("flags", [("--rollout-sde-type", "dance_sde"), ("--sde-type", "dance")])
def test_the_dynamics_are_chosen_by_either_name(url, prompts, tmp_path, engine, flags):
    out = tmp_path / "out"
    result = rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--seed", 1, *flags)
    assert result.exit_code == 0, result.output
    [expected] = engine.rollout(prompt=PROMPTS[0], seed=1, width=64, height=64, num_inference_steps=2, sde_type="dance")
    assert_same_bits(load_rollout(out / files_in(out)[0]), expected)


def test_an_evaluation_that_asks_for_an_environment_is_refused(url, prompts, tmp_path):
    words = ("--url", url, "--prompts", prompts, "--out", tmp_path / "out", *SMALL, "--no-rollout")
    for flag, field in (("--return-denoising-env", "return_denoising_env"), ("--rollout-noise-level=1", "rollout_noise_level")):
        assert_one_line_error(rollout(*words, flag), f"{field} must be left out of an evaluation (rollout=False)")


def test_an_evaluation_is_saved_as_well(url, prompts, tmp_path):
    out = tmp_path / "out"
    assert rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--no-rollout", "--seed", 1).exit_code == 0
    assert load_rollout(out / files_in(out)[0]).log_probs is None


def test_a_line_of_a_jsonl_file_gives_fields_that_go_before_the_flags(url, tmp_path, engine):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(
        '{"prompt": "a red fox", "seeds": [7, 9], "sde_type": "cps", "noise_level": 0.3, "request_id": "mine"}\n'
        '{"prompt": "三只猫", "seed": 3}\n',
        encoding="utf-8",
    )
    out = tmp_path / "out"
    result = rollout("--url", url, "--prompts", lines, "--out", out, *SMALL, "--noise-level", 0.9)
    assert result.exit_code == 0, result.output
    first, second, third = (load_rollout(out / name) for name in files_in(out))
    size = {"width": 64, "height": 64, "num_inference_steps": 2}
    expected = engine.rollout("a red fox", seeds=(7, 9), sde_type="cps", noise_level=0.3, request_id="mine", **size)
    assert_same_bits(first, expected[0])
    assert_same_bits(second, expected[1])
    assert (first.request_id, third.prompt, third.sampling.noise_level) == ("mine", "三只猫", 0.9)
    assert_same_bits(third, engine.rollout("三只猫", seed=3, noise_level=0.9, **size)[0])


def test_a_bad_line_is_refused_before_anything_is_sent(tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a"}\n{"prompt": "b", "noise_levle": 0.3}\n')
    words = ("--url", "http://127.0.0.1:9", "--prompts", lines, "--out", tmp_path / "out")
    assert_one_line_error(rollout(*words), "line 2, is refused: noise_levle must be a field of SamplingParams")
    assert not (tmp_path / "out").exists()


def test_a_failed_prompt_is_reported_at_the_end_and_the_others_are_saved(url, prompts, tmp_path, engine, monkeypatch):
    def fail_at_the_second(plan):
        if plan.params.prompt == PROMPTS[1]:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(engine, "hook", fail_at_the_second)
    out = tmp_path / "out"
    result = rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--seed", 0)
    assert result.exit_code == 1
    assert [name.partition("-sample")[0] for name in files_in(out)] == ["prompt-00001", "prompt-00003"]
    assert "2 rollouts of 2 prompts" in result.stdout
    assert "1 of 3 prompts failed" in result.stderr
    assert "prompt 2: " in result.stderr
    assert "Traceback" not in result.output


def test_a_request_that_the_server_refuses_is_reported_with_its_reason(url, prompts, tmp_path):
    result = rollout("--url", url, "--prompts", prompts, "--out", tmp_path / "out", "--height", 100)
    assert result.exit_code == 1
    assert "3 of 3 prompts failed" in result.stderr
    assert "height must be a multiple of 16" in result.stderr


def test_a_server_that_is_not_there_is_reported(prompts, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        result = rollout(
            "--url", f"http://127.0.0.1:{taken.getsockname()[1]}", "--prompts", prompts, "--out", tmp_path / "out", *SMALL
        )
    assert result.exit_code == 1
    assert "1 of 3 prompts failed, 2 were not tried:" in result.stderr
    assert "prompt 1: the server at " in result.stderr


def test_a_server_that_dies_ends_the_command_and_what_was_saved_stays(prompts, tmp_path, monkeypatch):
    tried = []

    def answer_once(client, params):
        tried.append(params.prompt)
        if len(tried) > 1:
            raise ServerConnectionError("the server is gone")
        return [make_rollout(seed=5)]

    monkeypatch.setattr(Client, "rollout", answer_once)
    out = tmp_path / "out"
    result = rollout("--url", "http://127.0.0.1:9", "--prompts", prompts, "--out", out)
    assert result.exit_code == 1
    assert tried == list(PROMPTS[:2])
    assert files_in(out) == ["prompt-00001-sample-00-seed-5.safetensors"]
    assert "1 rollouts of 1 prompts" in result.stdout
    assert "1 of 3 prompts failed, 1 were not tried:" in result.stderr
    assert "prompt 2: the server is gone" in result.stderr


def test_a_full_disk_ends_the_command_and_what_was_saved_stays(url, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = os.fsync
    written = []

    def full_at_the_third(descriptor):
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_third)
    result = rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--seed", 5, "--num-outputs-per-prompt", 2)
    assert result.exit_code == 1
    assert "prompt 2: path must be writable" in result.output and "1 were not tried" in result.output
    assert files_in(out) == [f"prompt-00001-sample-{index:02d}-seed-{5 + index}.safetensors" for index in (0, 1)]


def test_the_api_key_is_sent(service, prompts, tmp_path):
    with serving(service, api_key="sesame") as client:
        words = ("--url", str(client.base_url), "--prompts", prompts, "--out", tmp_path / "out", *SMALL)
        refused = rollout(*words)
        assert refused.exit_code == 1
        assert "1 of 3 prompts failed, 2 were not tried:" in refused.stderr
        assert rollout(*words, "--api-key", "sesame").exit_code == 0


def test_a_bad_value_is_refused_before_anything_is_sent(prompts, tmp_path):
    words = ("--url", "http://127.0.0.1:9", "--prompts", prompts, "--out", tmp_path / "out", "--noise-level", 99)
    assert_one_line_error(rollout(*words), "noise_level must be 0 or from")
    assert not (tmp_path / "out").exists()


def test_a_missing_prompt_file_is_a_usage_error(tmp_path):
    result = rollout("--url", "http://127.0.0.1:9", "--prompts", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--prompts" in result.stderr
