"""A rollout as a thing: what it prints, shows, saves and moves, some of its steps, and a group of them stacked."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.factories import assert_same_answer, make_evaluation, make_image, make_record, make_rollout

from flowroll import Rollout
from flowroll.errors import InvalidRequestError, RolloutFileError
from flowroll.families import FAMILIES
from flowroll.types import StepImages, StepTensors
from flowroll.types.shown import tensors_of
from flowroll.wire.files import load_rollout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_prints_in_a_few_lines(family: str) -> None:
    lines = repr(make_rollout(family=family, steps=50)).splitlines()
    assert len(lines) <= 9 and max(map(len, lines)) <= 200
    assert lines[0] == "Rollout of 'a cat that says \"π ≈ 3\", 猫', seed 0, weights 7"
    text = "\n".join(lines)
    assert f"{family}, 50 steps, sde, noise level 0.7, guidance 4, 48 x 32 pixels" in text
    assert "float32[3, 1, 32, 48]" in text and "states 0 to 50" in text and "iB, 1.25 s" in text and "tensor(" not in text


def test_what_is_absent_is_not_printed_and_its_parts_print_short() -> None:
    rollout = make_evaluation(prompt=None, image_format="none")
    assert "token ids" in repr(rollout)
    assert not any(name in repr(rollout) for name in ("log_probs", "dit_trajectory", "debug_tensors", "  image", "None"))
    whole = make_rollout()
    for part in (whole.dit_trajectory, whole.debug_tensors, whole.denoising_env, make_image()):
        assert len(repr(part)) < 2000 and "tensor(" not in repr(part) and type(part).__name__ in repr(part)
    window = dataclasses.replace(whole, sde_step_indices=(1,))
    assert "log_probs" in repr(window) and repr(window).split("log_probs")[1].split("\n")[0].split()[0::2] == ["-", "-"]


def test_a_notebook_shows_the_picture_beside_the_same_rows_and_a_prompt_is_no_html() -> None:
    shown = make_rollout(prompt="<script>alert('x')</script>")._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert 'src="data:image/png;base64,' in shown and "dit_trajectory" in shown
    assert "<img" not in make_evaluation(image_format="none")._repr_html_()


def test_without_pillow_a_notebook_shows_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = make_rollout()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert rollout._repr_png_() is None
    assert "<img" not in rollout._repr_html_() and "dit_trajectory" in rollout._repr_html_()
    with pytest.raises(ImportError, match=r"A picture must have PIL, got none .*'flowroll\[client\]'"):
        rollout.pil()


@pytest.mark.parametrize("image_format", ["tensor", "uint8", "png"])
def test_the_picture_is_the_same_in_every_form(image_format: Any, tmp_path: Path) -> None:
    rollout = make_evaluation(image_format=image_format)
    expected = make_evaluation(image_format="png").image
    assert rollout._repr_png_() == expected
    assert (rollout.pil().mode, rollout.pil().size) == ("RGB", (48, 32))
    rollout.save(tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes() == expected
    assert Image.open(tmp_path / "a.PNG").tobytes() == rollout.pil().tobytes()


def test_a_plain_image_shows_itself_too() -> None:
    image = make_image()
    assert image.pil().tobytes() == make_evaluation().pil().tobytes() and image._repr_png_() == make_evaluation()._repr_png_()


def test_what_has_no_picture_says_so(tmp_path: Path) -> None:
    rollout = make_evaluation(image_format="none")
    assert rollout._repr_png_() is None
    for show in (rollout.pil, lambda: rollout.save(tmp_path / "a.png")):
        with pytest.raises(
            InvalidRequestError, match="must have a picture, got latents alone; roll out with another image_format"
        ):
            show()
    with pytest.raises(RolloutFileError, match="path must be writable"):
        make_rollout().save(tmp_path / "missing" / "a.png")


def test_a_rollout_saves_itself(tmp_path: Path) -> None:
    make_rollout().save(tmp_path / "a.safetensors")
    assert_same_answer(make_rollout(), load_rollout(tmp_path / "a.safetensors"))


def test_every_tensor_goes_to_the_device_and_what_is_there_stays() -> None:
    images = StepImages(step_indices=(0,), images=(torch.rand(3, 1, 32, 48),))
    rollout = make_rollout(
        step_tensors=StepTensors(step_indices=(1,), tensors={"x0": torch.rand(1, 6, 64)}), step_images=images
    )
    assert len(list(tensors_of(rollout))) > 10
    assert {tensor.device.type for tensor in tensors_of(rollout.to("meta"))} == {"meta"}
    assert_same_answer(rollout.to("cpu"), rollout)
    assert rollout.to("cpu").image is rollout.image


def some_steps(rollout: Rollout, steps: list[int]) -> dict[str, torch.Tensor]:
    """The rows that a slice has of the debug tensors."""
    debug = rollout.debug_tensors
    assert debug is not None
    named = {"velocity": debug.model_output, "mean": debug.prev_sample_mean, "std": debug.noise_std_dev}
    return {name: tensor[steps] for name, tensor in {**named, "noise": debug.variance_noise}.items()}


@pytest.mark.parametrize(("wanted", "steps"), [(slice(1, 3), [1, 2]), (-1, [3]), ([3, 0], [0, 3]), (slice(None), [0, 1, 2, 3])])
def test_a_slice_has_the_tensors_of_its_steps(wanted: Any, steps: list[int], tmp_path: Path) -> None:
    images = StepImages(step_indices=(0, 2), images=(torch.rand(3, 1, 32, 48), torch.rand(3, 1, 32, 48)))
    whole = make_rollout(step_images=images)
    part = whole[wanted]
    assert whole.dit_trajectory is not None and part.dit_trajectory is not None and part.step_tensors is not None
    states = sorted({state for step in steps for state in (step, step + 1)})
    assert part.dit_trajectory.latent_step_indices == tuple(states)
    assert torch.equal(part.dit_trajectory.latents, whole.dit_trajectory.latents[states])
    assert part.step_tensors.step_indices == tuple(steps) and part.debug_tensors is None
    expected = some_steps(whole, steps)
    assert part.step_tensors.tensors.keys() == expected.keys()
    assert all(torch.equal(part.step_tensors.tensors[name], tensor) for name, tensor in expected.items())
    shown = [step for step in (0, 2) if step in steps]
    assert (part.step_images.step_indices if part.step_images else ()) == tuple(shown)
    assert part.log_probs is whole.log_probs and part.sampling is whole.sampling
    part.save(tmp_path / "part.safetensors")
    assert_same_answer(part, load_rollout(tmp_path / "part.safetensors"))


def test_a_slice_keeps_chosen_fields_and_the_state_before_where_the_solver_needs_it() -> None:
    chosen = StepTensors(step_indices=(0, 2), tensors={"x0": torch.arange(2.0)[:, None]})
    part = make_rollout(debug_tensors=None, step_tensors=chosen)[1:4]
    assert part.step_tensors is not None and part.step_tensors.step_indices == (2,)
    assert part.step_tensors.tensors["x0"].tolist() == [[1.0]]
    assert make_rollout(debug_tensors=None, step_tensors=chosen)[1].step_tensors is None
    both = make_rollout(step_tensors=chosen)[1:4].step_tensors
    assert both is not None and both.step_indices == (2,) and set(both.tensors) == {"x0", "velocity", "mean", "std", "noise"}
    multistep = dataclasses.replace(make_record(), sde_type="dpmpp2m")
    trajectory = make_rollout(sampling=multistep)[2].dit_trajectory
    assert trajectory is not None and trajectory.latent_step_indices == (1, 2, 3)


@pytest.mark.parametrize("wanted", [4, -5, [], slice(2, 2), [0, 9]])
def test_steps_that_are_not_there_are_refused_and_a_rollout_is_no_sequence(wanted: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"steps must (lie in 0..3|hold at least one of the 4 steps), got "):
        make_rollout()[wanted]
    with pytest.raises(TypeError):
        iter(make_rollout())  # type: ignore[call-overload]


def test_a_group_is_stacked() -> None:
    group = [make_rollout(seed=seed) for seed in (3, 5)]
    stacked = Rollout.stack(group)
    assert len(stacked) == 2 and stacked.seeds == (3, 5) and stacked.weight_versions == ("7", "7")
    assert stacked.images is not None and stacked.images.shape == (2, 3, 1, 32, 48)
    assert stacked.latents is not None and stacked.log_probs is not None
    for index, one in enumerate(group):
        assert one.dit_trajectory is not None and one.log_probs is not None
        assert torch.equal(stacked.latents[index], one.dit_trajectory.latents)
        assert torch.equal(stacked.log_probs[index], one.log_probs)
    assert stacked.sigmas.tolist() == list(group[0].sampling.sigmas)
    assert stacked.to("meta").log_probs.device.type == "meta"  # type: ignore[union-attr]
    assert "float32[2, 3, 1, 32, 48]" in repr(stacked)
    assert Rollout.stack([make_evaluation(image_format="png")] * 2).images is None


def test_rollouts_that_differ_are_not_stacked() -> None:
    one = make_rollout()
    for other, name in (
        (make_rollout(steps=5), "sigmas"),
        (make_rollout(sde_step_indices=(1,)), "sde_step_indices"),
        (make_rollout()[1:3], "latent_step_indices"),
        (make_rollout(height=48), "the shape of "),
        (make_rollout(image_format="png"), "the shape of image"),
    ):
        with pytest.raises(InvalidRequestError, match=f"rollouts must be alike in {name}.* to be stacked, got .* at index 1 "):
            Rollout.stack([one, other])
    with pytest.raises(InvalidRequestError, match="rollouts must hold at least one rollout"):
        Rollout.stack([])
