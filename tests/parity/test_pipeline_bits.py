"""Plain generation, and ODE rollouts, are the bits of the diffusers pipeline run for that one sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowroll.engine import Engine

PROMPT = "a photo of two wine glasses"
SIZES = [(64, 64), (96, 64), (80, 144), (256, 256)]
SCALES = {("qwen_image", True): 4.0, ("qwen_image", False): 1.0, ("z_image", True): 5.0, ("z_image", False): 0.0}


def pipeline_output(
    pipeline: Any, family: str, output_type: str, *, seed: int, scale: float, negative: str, **size: int
) -> Tensor:
    guidance = {"true_cfg_scale": scale} if family == "qwen_image" else {"guidance_scale": scale}
    generator = torch.Generator(pipeline.device).manual_seed(seed)
    output = pipeline(PROMPT, negative_prompt=negative, generator=generator, output_type=output_type, **guidance, **size)
    return output.images[0].cpu()


def settings(family: str, cfg: bool, height: int, width: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    scale, negative = SCALES[family, cfg], " " if family == "qwen_image" else ""
    size = {"height": height, "width": width, "num_inference_steps": steps}
    ours = {"prompt": PROMPT, "seed": 11, "guidance_scale": scale, **size}
    theirs = {"seed": 11, "scale": scale, "negative": negative, **size}
    return ours, theirs


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_latents_are_the_pipelines_bits(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    family: str,
    dtype: str,
    cfg: bool,
    height: int,
    width: int,
    steps: int,
) -> None:
    ours, theirs = settings(family, cfg, height, width, steps)
    expected = pipeline_output(pipeline_of(family, dtype), family, "latent", **theirs)
    engine = engine_of(family, dtype)
    plain = engine.generate(**ours)[0].latents
    assert plain.dtype == expected.dtype
    assert torch.equal(plain, expected)
    rollout = engine.rollout(**ours, sde_type="ode", return_dit_trajectory=True)[0]
    assert rollout.dit_trajectory is not None
    assert rollout.dit_trajectory.latents.dtype == expected.dtype
    assert torch.equal(rollout.dit_trajectory.latents[-1], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_a_full_trajectory_of_default_steps_is_the_pipelines_bits(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], family: str, dtype: str
) -> None:
    ours, theirs = settings(family, True, 64, 64, 50)
    expected = pipeline_output(pipeline_of(family, dtype), family, "latent", **theirs)
    del ours["num_inference_steps"]
    assert torch.equal(engine_of(family, dtype).generate(**ours)[0].latents, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_pictures_are_the_pipelines_bits(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], family: str, dtype: str
) -> None:
    ours, theirs = settings(family, True, 64, 96, 2)
    expected = pipeline_output(pipeline_of(family, dtype), family, "pt", **theirs).float()
    image = engine_of(family, dtype).rollout(**ours, rollout=False)[0].image
    assert torch.equal(image[:, 0], expected)


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_default_guidance_and_negative_prompt_are_the_familys(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], family: str
) -> None:
    ours, theirs = settings(family, True, 64, 64, 3)
    del ours["guidance_scale"]
    expected = pipeline_output(pipeline_of(family, "float32"), family, "latent", **theirs)
    assert torch.equal(engine_of(family, "float32").generate(**ours)[0].latents, expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_small_guidance_scales_are_guided_where_the_pipeline_guides(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], family: str, scale: float
) -> None:
    """Qwen-Image guides above 1, Z-Image above 0."""
    ours, theirs = settings(family, True, 64, 64, 2)
    expected = pipeline_output(pipeline_of(family, "float32"), family, "latent", **{**theirs, "scale": scale})
    assert torch.equal(engine_of(family, "float32").generate(**{**ours, "guidance_scale": scale})[0].latents, expected)


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "一只红色的猫坐在窗台上 🐈 été"])
def test_unusual_prompts_are_encoded_as_the_pipeline_does(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], family: str, prompt: str
) -> None:
    scale = {"true_cfg_scale": 1.0} if family == "qwen_image" else {"guidance_scale": 0.0}
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    pipeline = pipeline_of(family, "float32")
    generator = torch.Generator(pipeline.device).manual_seed(1)
    expected = pipeline(prompt, generator=generator, output_type="latent", **scale, **size).images[0]
    plain = engine_of(family, "float32").generate(prompt=prompt, seed=1, guidance_scale=0, **size)[0]
    assert torch.equal(plain.latents, expected.cpu())


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_the_bits_agree_at_another_thread_count(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], family: str
) -> None:
    ours, theirs = settings(family, True, 80, 144, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = pipeline_output(pipeline_of(family, "float32"), family, "latent", **theirs)
        assert torch.equal(engine_of(family, "float32").generate(**ours)[0].latents, expected)
    finally:
        torch.set_num_threads(threads)
