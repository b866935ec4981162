from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from tests.unit.cli.invoking import run_cli
from typer.testing import CliRunner

from flowroll import SamplingParams
from flowroll.cli.sampling_flags import with_sampling_flags
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.types import ALIASES
from flowroll.types.params import TENSORS

FIELDS = [field.name for field in fields(SamplingParams) if field.name not in TENSORS]
FILE = Path(__file__)
# A value other than the default for every field: words of the command line, and what they mean.
ALL_FLAGS = {
    "prompt": (["--prompt", "a red fox"], "a red fox"),
    "negative_prompt": (["--negative-prompt", "blur"], "blur"),
    "prompt_token_ids": (["--prompt-token-ids", "[[5, 6], [7]]"], ([5, 6], [7])),
    "negative_prompt_token_ids": (["--negative-prompt-token-ids", "[[8]]"], ([8],)),
    "images": (["--images", f"{FILE}", "--images", f"{FILE}"], [FILE.read_bytes()] * 2),
    "seed": (["--seed", "7"], 7),
    "seeds": (["--seeds", "7,9"], (7, 9)),
    "init_seed": (["--init-seed", "7"], 7),
    "sde_seed": (["--sde-seed", "7,9"], (7, 9)),
    "start_step": (["--start-step", "1"], 1),
    "stop_step": (["--stop-step", "2"], 2),
    "fork": (["--fork", '{"0": 2}'], {"0": 2}),
    "generator_device": (["--generator-device", "cpu"], "cpu"),
    "width": (["--width", "64"], 64),
    "height": (["--height", "80"], 80),
    "num_inference_steps": (["--num-inference-steps", "3"], 3),
    "num_outputs_per_prompt": (["--num-outputs-per-prompt", "2"], 2),
    "num_frames": (["--num-frames", "1"], 1),
    "fps": (["--fps", "24"], 24.0),
    "guidance_scale": (["--guidance-scale", "2.5"], 2.5),
    "guidance_scales": (["--guidance-scales", "4,1.5,0"], (4.0, 1.5, 0.0)),
    "true_cfg_scale": (["--true-cfg-scale", "3"], 3.0),
    "sigmas": (["--sigmas", "1,0.5,0"], (1.0, 0.5, 0.0)),
    "rollout": (["--no-rollout"], False),
    "rollout_sde_type": (["--rollout-sde-type", "cps"], "cps"),
    "rollout_noise_level": (["--rollout-noise-level", "0.3"], 0.3),
    "rollout_log_prob_no_const": (["--rollout-log-prob-no-const"], True),
    "log_prob": (["--log-prob", '{"reduce": "sum"}'], {"reduce": "sum"}),
    "rollout_debug_mode": (["--rollout-debug-mode"], True),
    "rollout_return_denoising_env": (["--rollout-return-denoising-env"], True),
    "rollout_return_dit_trajectory": (["--rollout-return-dit-trajectory"], True),
    "rollout_sde_step_indices": (["--rollout-sde-step-indices", "0,2"], (0, 2)),
    "rollout_steps": (["--rollout-steps", '[{"dynamics": "ode"}, {}]'], ({"dynamics": "ode"}, {})),
    "rollout_noise_levels": (["--rollout-noise-levels", "0.5,0"], (0.5, 0.0)),
    "rollout_return_step_indices": (["--rollout-return-step-indices", "3"], (3,)),
    "return_fields": (["--return-fields", "x0,mean"], ("x0", "mean")),
    "decode_step_indices": (["--decode-step-indices", "0,2"], (0, 2)),
    "image_format": (["--image-format", "uint8"], "uint8"),
    "suppress_logs": (["--suppress-logs"], True),
    "request_id": (["--request-id", "mine"], "mine"),
    "min_weight_version": (["--min-weight-version", "7"], "7"),
    "max_staleness": (["--max-staleness", "1"], 1),
    "policy": (["--policy", "old"], "old"),
    "lora_name": (["--lora-name", "old"], "old"),
}


def given_by(*words, without=()):
    """What a command with the sampling flags receives."""
    received = []

    def command(given: dict[str, object], out: str = "here") -> None:
        received.append((given, out))

    app = typer.Typer()
    app.command()(with_sampling_flags(command, without=without))
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    [(given, out)] = received
    assert out == "here"
    return given


def test_every_field_of_sampling_params_is_covered_here():
    assert list(ALL_FLAGS) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_sets_its_field_and_no_other(name):
    words, value = ALL_FLAGS[name]
    given = given_by("--prompt", "p", *words)
    assert given == {"prompt": "p", name: value}
    assert type(given[name]) is type(value)


@pytest.mark.parametrize(("short", "name"), ALIASES.items())
def test_a_short_flag_gives_the_same_value(short, name):
    words, value = ALL_FLAGS[name]
    assert given_by("--prompt", "p", words[0].replace("rollout-", "", 1), *words[1:]) == {"prompt": "p", short: value}


@pytest.mark.parametrize(("short", "name"), ALIASES.items())
def test_a_value_given_by_both_flags_is_refused_with_both_names(short, name, tmp_path):
    (prompts := tmp_path / "prompts.txt").write_text("a cat\n")
    words = ALL_FLAGS[name][0]
    both = [*words, words[0].replace("rollout-", "", 1), *words[1:]]
    result = run_cli("rollout", "--url", "http://127.0.0.1:9", "--prompts", prompts, "--out", tmp_path / "out", *both)
    assert result.exit_code != 0
    assert f"{name} must be given once, got {short} beside it" in " ".join(result.stderr.split())


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    result = run_cli("generate", tmp_path, "--prompt", "p", "--images", tmp_path / "cat.png")
    assert result.exit_code != 0 and "cat.png" in result.stderr and "No such file" in result.stderr


def test_latents_come_from_a_file(tmp_path):
    save_file({"latents": torch.ones(2, 3)}, tmp_path / "state.safetensors")
    given = given_by("--prompt", "p", "--latents", str(tmp_path / "state.safetensors"))
    assert list(given) == ["prompt", "latents"] and torch.equal(given["latents"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents": torch.ones(2), "x": torch.ones(2)}, "latents must name a file with one tensor, latents, got latents, x"),
        ({"x": torch.ones(2)}, "latents must name a file with one tensor, latents, got x"),
        ("no tensors", "latents must name a safetensors file"),
        (None, "latents must name a safetensors file"),
    ],
)
def test_another_file_of_latents_is_a_usage_error(tensors, message, tmp_path):
    file = tmp_path / "state.safetensors"
    if tensors is not None:
        file.write_text(tensors) if isinstance(tensors, str) else save_file(tensors, file)
    result = run_cli("generate", tmp_path, "--prompt", "p", "--latents", file)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_unset_flags_are_not_given():
    assert given_by("--prompt", "p") == {"prompt": "p"}


def test_all_flags_together_are_given():
    words = [word for flag, _ in ALL_FLAGS.values() for word in flag]
    assert given_by(*words) == {name: value for name, (_, value) in ALL_FLAGS.items()}


def test_a_switch_set_to_its_default_is_given():
    assert given_by("--prompt", "p", "--rollout", "--no-debug-mode") == {"prompt": "p", "rollout": True, "debug_mode": False}


def test_an_empty_list_is_a_list_and_not_an_unset_flag():
    assert given_by("--prompt", "p", "--sde-step-indices", "") == {"prompt": "p", "sde_step_indices": ()}


def test_an_empty_prompt_is_a_prompt():
    assert given_by("--prompt", "") == {"prompt": ""}


def test_left_out_fields_have_no_flag_under_either_name():
    assert given_by(without={"prompt"}) == {}
    with pytest.raises(AssertionError, match="No such option"):
        given_by("--sde-type", "cps", without={"prompt", "rollout_sde_type"})


@pytest.mark.parametrize("command", ["generate", "rollout"])
def test_every_flag_is_explained_by_the_fields_own_docstring(command):
    result = run_cli(command, "--help")
    text = " ".join(result.stdout.split())
    own = {"min_weight_version", "max_staleness", "lora_name"}
    without = {"generate": {*own, "policy"}, "rollout": {*own, "prompt", "request_id"}}[command]
    names = [name for name in FIELDS if name not in without]
    for name in names:
        assert "--" + name.replace("_", "-") in text
    assert "--min-weight-version" not in text
    # The help breaks lines at hyphens too.
    text = "".join(text.split())
    for description in (
        *(f"{name}: {found.summary}" for name, found in DYNAMICS.items()),
        "T + 1 noise levels used verbatim",
        "Steps that follow `rollout_sde_type`",
        "In short: --sde-step-indices.",
        "below 2 for cps",
        "Return every transformer argument.",
    ):
        assert "".join(description.split()) in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1,x"], "must be integers separated by commas, got '1,x'"),
        (["--seeds", "1.5"], "must be integers separated by commas"),
        (["--sigmas", "1,,0"], "must be numbers separated by commas"),
        (["--sde-type", "flow-sde"], "'flow-sde' is not one of"),
        (["--seed", "many"], "--seed"),
        (["--no-such-flag"], "No such option"),
    ],
)
def test_a_word_that_cannot_be_read_is_a_usage_error(words, message):
    result = run_cli("generate", "shapes-z_image", "--prompt", "p", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_missing_prompt_is_a_usage_error():
    result = run_cli("generate", "shapes-z_image")
    assert result.exit_code == 2
    assert "--prompt" in result.stderr
