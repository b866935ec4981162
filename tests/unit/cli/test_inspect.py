from dataclasses import fields

import pytest
from PIL import Image
from tests.factories import make_evaluation, make_rollout
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll.cli.output import num_bytes, tensors_of
from flowroll.types.shown import format_bytes
from flowroll.wire.files import save_rollout


@pytest.fixture
def rollout():
    return make_rollout(steps=4, sde_step_indices=(0, 1, 2))


@pytest.fixture
def file(tmp_path, rollout):
    path = tmp_path / "one.safetensors"
    save_rollout(path, rollout)
    return path


@pytest.mark.parametrize("columns", [80, 200])
def test_it_shows_every_tensor_with_shape_and_dtype_on_a_line(columns, file, rollout):
    result = run_cli("inspect", file, columns=columns)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    for name, tensor in tensors_of(rollout):
        [line] = [words for words in lines if words and words[0] == name]
        assert " ".join(line).startswith(f"{name} {' x '.join(map(str, tensor.shape))} {str(tensor.dtype)[6:]} ")


def test_it_shows_the_log_prob_and_the_dynamics_of_every_step(file, rollout):
    lines = [line.split() for line in run_cli("inspect", file).stdout.splitlines()]
    sigmas = rollout.sampling.sigmas
    for step, log_prob in enumerate(rollout.log_probs.tolist()):
        dynamics = "deterministic" if step == 3 else "sde"
        assert [str(step), f"{sigmas[step]:.4f}", f"{sigmas[step + 1]:.4f}", dynamics, f"{log_prob:+.6f}"] in lines


def test_names_in_the_record_are_whole_on_a_narrow_terminal(file, rollout):
    words = run_cli("inspect", file, columns=50).stdout.split()
    for field in fields(rollout.sampling):
        assert f"sampling.{field.name}" in words


def test_it_shows_the_record(file):
    text = " ".join(run_cli("inspect", file).stdout.split())
    assert "sampling.family qwen_image" in text
    assert "sampling.noise_level 0.7" in text
    assert "sde_step_indices 0, 1, 2" in text
    assert 'a cat that says "π ≈ 3", 猫' in text


def test_brackets_in_a_prompt_are_shown_as_they_are(tmp_path):
    prompt = "a sign that says [red] or [/bold]"
    save_rollout(tmp_path / "one.safetensors", make_rollout(prompt=prompt))
    result = run_cli("inspect", tmp_path / "one.safetensors")
    assert result.exit_code == 0
    assert prompt in result.stdout


def test_a_plot_in_a_folder_that_is_not_there_is_one_clear_line(file, tmp_path):
    assert_one_line_error(run_cli("inspect", file, "--plot", tmp_path / "none" / "plot.png"), "every path must be usable")


def test_it_writes_a_plot(file, tmp_path):
    result = run_cli("inspect", file, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    width, height = Image.open(tmp_path / "plot.png").size
    assert width > 600 and height > 400


def test_an_evaluation_has_no_log_probs_to_show_or_to_plot(tmp_path):
    file = tmp_path / "one.safetensors"
    save_rollout(file, make_evaluation())
    result = run_cli("inspect", file)
    assert result.exit_code == 0
    assert "Log-probs" not in result.stdout
    assert_one_line_error(run_cli("inspect", file, "--plot", tmp_path / "plot.png"), "must have log-probs")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file"])
def test_a_file_that_is_no_rollout_is_one_clear_line(content, tmp_path):
    path = tmp_path / "broken.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert_one_line_error(run_cli("inspect", path), "broken.safetensors")


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB")])
def test_bytes_are_shown_in_a_unit_that_fits(count, text):
    assert format_bytes(count) == text


def test_bytes_are_those_of_all_tensors():
    rollout = make_evaluation(height=32, width=48)
    assert num_bytes(rollout) == 3 * 32 * 48 * 4
