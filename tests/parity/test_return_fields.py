"""Chosen fields of chosen steps: rows of what the debug tensors hold, and clean predictions as numbers and as pictures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pairs import FAMILY_WITH_DTYPE
from torch import Tensor

from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.types.pictures import encode_png, to_uint8

EngineOf = Callable[[str, str], Engine]
REQUEST: dict[str, Any] = {
    "prompt": "a red apple",
    "height": 64,
    "width": 96,
    "num_inference_steps": 3,
    "seed": 3,
    "noise_level": 0.6,
    "sde_step_indices": (0, 1),
}
NAMES = {"velocity": "model_output", "mean": "prev_sample_mean", "std": "noise_std_dev", "noise": "variance_noise"}


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_fields_are_rows_of_the_debug_tensors_and_x0_follows_from_them(engine_of: EngineOf, name: str, dtype: str) -> None:
    engine = engine_of(name, dtype)
    (whole,) = engine.rollout(**REQUEST, return_dit_trajectory=True, debug_mode=True)
    (chosen,) = engine.rollout(
        **REQUEST, return_fields=("x0", *NAMES), return_step_indices=(3, 2, 0), debug_mode=False, decode_step_indices=(2, 1)
    )
    assert chosen.debug_tensors is None and chosen.step_tensors is not None and whole.step_tensors is whole.step_images is None
    assert whole.debug_tensors is not None and whole.dit_trajectory is not None
    assert chosen.step_tensors.step_indices == (0, 2) and list(chosen.step_tensors.tensors) == ["x0", *NAMES]
    for field, debug in NAMES.items():
        assert torch.equal(chosen.step_tensors.tensors[field], getattr(whole.debug_tensors, debug)[[0, 2]]), field
    for row, step in enumerate((0, 2)):
        sigma = torch.tensor(whole.sampling.sigmas[step])
        expected = whole.dit_trajectory.latents[step].float() - whole.debug_tensors.model_output[step] * sigma
        assert torch.equal(chosen.step_tensors.tensors["x0"][row], expected)
    assert torch.equal(chosen.log_probs, whole.log_probs) and torch.equal(chosen.image, whole.image)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_a_decoded_prediction_is_the_picture_of_x0(engine_of: EngineOf, name: str, dtype: str) -> None:
    engine = engine_of(name, dtype)
    asked: Any = {"return_fields": ("x0",), "decode_step_indices": (2, 0), "debug_mode": False}
    kinds = {form: engine.rollout(**REQUEST, **asked, image_format=form)[0] for form in ("tensor", "uint8", "png")}
    first = kinds["tensor"]
    assert first.step_tensors is not None and first.step_images is not None
    assert first.step_images.step_indices == (0, 2)
    for row, step in enumerate((0, 2)):
        expected = engine.decode(first.step_tensors.tensors["x0"][step], height=64, width=96)
        found = [rollout.step_images.images[row] for rollout in kinds.values() if rollout.step_images is not None]
        assert isinstance(found[0], Tensor) and isinstance(found[1], Tensor)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], to_uint8(expected)) and found[2] == encode_png(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_fields": ("x1",)}, "return_fields must hold some of x0, velocity, mean, std, noise, got 'x1'"),
        ({"return_fields": ()}, "return_fields must name a field"),
        ({"return_fields": ("x0", "x0")}, "return_fields must name each field once"),
        ({"decode_step_indices": (3,)}, "decode_step_indices must lie in 0..2 for 3 steps, got 3"),
        (
            {"decode_step_indices": (0,), "image_format": "none"},
            r"decode_step_indices must be left out where nothing is decoded, got \[0\]",
        ),
        ({"return_fields": ("x0",), "rollout": False}, "return_fields must be left out of an evaluation"),
    ],
)
def test_what_cannot_be_returned_is_refused(engine_of: EngineOf, options: dict[str, Any], message: str) -> None:
    request = {key: value for key, value in REQUEST.items() if key not in ("noise_level", "sde_step_indices")}
    with pytest.raises(InvalidRequestError, match=message):
        engine_of("z_image", "float32").rollout(**request, **options)
