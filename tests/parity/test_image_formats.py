"""The picture of a rollout in each form: the same eight bits, and none without any work of the VAE."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pairs import FAMILY_WITH_DTYPE
from torch import Tensor

from flowroll.engine import Engine

EngineOf = Callable[[str, str], Engine]
REQUEST: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 96, "num_inference_steps": 2, "seed": 3}


def pixels_of(png: bytes) -> Tensor:
    """What any reader of the file sees, in the layout of a rollout."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).permute(2, 0, 1)[:, None]


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_every_form_holds_the_eight_bits_of_the_pipelines_own_picture(
    engine_of: EngineOf, pipeline_of: Callable[[str, str], Any], name: str, dtype: str
) -> None:
    engine = engine_of(name, dtype)
    (as_tensor,), (as_bits,), (as_png,) = (
        engine.rollout(**REQUEST, rollout=False, image_format=form) for form in ("tensor", "uint8", "png")
    )
    assert isinstance(as_tensor.image, Tensor) and isinstance(as_bits.image, Tensor) and isinstance(as_png.image, bytes)
    processor = pipeline_of(name, dtype).image_processor
    (saved,) = processor.numpy_to_pil(processor.pt_to_numpy(as_tensor.image[:, 0][None]))
    expected = torch.from_numpy(np.array(saved)).permute(2, 0, 1)[:, None]
    assert as_bits.image.dtype == torch.uint8 and torch.equal(as_bits.image, expected)
    assert torch.equal(pixels_of(as_png.image), expected)
    assert [rollout.sampling.image_format for rollout in (as_tensor, as_bits, as_png)] == ["tensor", "uint8", "png"]
    assert as_tensor.latents is as_bits.latents is as_png.latents is None


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_latents_alone_take_no_work_of_the_vae(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    engine = engine_of(name, dtype)
    (whole,) = engine.rollout(**REQUEST, return_dit_trajectory=True)
    (plain,) = engine.generate(**REQUEST)

    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("the VAE was called")

    monkeypatch.setattr(engine._pipeline.vae, "decode", decode)
    (alone,) = engine.rollout(**REQUEST, image_format="none", debug_mode=False)
    (evaluation,) = engine.rollout(**REQUEST, image_format="none", rollout=False)
    assert alone.image is evaluation.image is alone.dit_trajectory is None
    assert whole.dit_trajectory is not None and alone.latents is not None and evaluation.latents is not None
    assert torch.equal(alone.latents.to(whole.dit_trajectory.latents.dtype), whole.dit_trajectory.latents[-1])
    assert torch.equal(evaluation.latents, plain.latents)
    assert alone.log_probs is not None and whole.log_probs is not None and torch.equal(alone.log_probs, whole.log_probs)
