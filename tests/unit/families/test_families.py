"""A family's arithmetic, against the pipeline's own."""

import pytest
import torch
from diffusers import QwenImagePipeline

from flowroll.errors import UnsupportedModelError
from flowroll.families import FAMILIES, Guidance, ModelSpec, family_of_pipeline
from flowroll.families.qwen_image import QwenImage
from flowroll.families.z_image import ZImage

SPEC = ModelSpec(latent_channels=16, vae_scale_factor=8, widths={"text": 48})


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 160), (1024, 768)])
def test_qwen_image_packs_as_its_pipeline_packs(height: int, width: int) -> None:
    geometry = QwenImage().geometry(SPEC, height=height, width=width)
    noise = torch.randn(geometry.noise_shape)
    packed = QwenImagePipeline._pack_latents(noise, 1, 16, height // 8, width // 8)
    assert torch.equal(QwenImage().initial_latents(noise), packed[0])
    assert packed[0].shape == geometry.latent_shape
    assert geometry.num_tokens == packed.shape[1]


def test_z_image_latents_are_the_noise() -> None:
    geometry = ZImage().geometry(SPEC, height=64, width=96)
    assert geometry.latent_shape == (16, 8, 12) and geometry.noise_shape == (1, 16, 8, 12) and geometry.num_tokens == 24


@pytest.mark.parametrize("name", ["qwen_image", "flux", "flux2"])
def test_the_timestep_is_rounded_before_the_division(name: str) -> None:
    timesteps = torch.linspace(1, 1000, 100)
    expected = (timesteps.to(torch.bfloat16) / 1000).float()
    assert torch.equal(FAMILIES[name].model_timesteps(timesteps, torch.bfloat16).float(), expected)
    assert not torch.equal(expected, (timesteps / 1000).to(torch.bfloat16).float())


def test_the_z_image_timestep_runs_from_noise_zero_to_data_one() -> None:
    assert ZImage().model_timesteps(torch.tensor([1000.0, 250.0]), torch.float32).tolist() == [0.0, 0.75]


def test_qwen_image_guidance_keeps_the_norm_of_every_conditional_token() -> None:
    positive, negative = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    combined = QwenImage.guide(positive, negative, 4.0)
    torch.testing.assert_close(combined.norm(dim=-1), positive.norm(dim=-1))
    direction = negative + 4.0 * (positive - negative)
    cosine = torch.nn.functional.cosine_similarity(combined, direction, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(1, 5))


def test_z_image_guidance_starts_from_the_conditional_branch() -> None:
    positive, negative = torch.randn(16, 1, 4, 4), torch.randn(16, 1, 4, 4)
    assert torch.equal(ZImage.guide([positive, negative], 2.0), positive + 2.0 * (positive - negative))
    assert torch.equal(ZImage.guide([positive], 2.0), positive)


@pytest.mark.parametrize(
    ("name", "scale", "active"),
    [
        ("qwen_image", 1, False),
        ("qwen_image", 1.01, True),
        ("z_image", 0, False),
        # The pipeline guides above 0, whatever other families do.
        ("z_image", 0.5, True),
        ("z_image", 1, True),
        ("flux", 1, False),
        ("flux", 1.01, True),
        ("flux2", 1, False),
        ("flux2", 1.01, True),
    ],
)
def test_guidance_runs_where_the_pipeline_runs_it(name: str, scale: float, active: bool) -> None:
    guidance = FAMILIES[name].guidance(scale)
    assert guidance.is_active == active
    assert guidance == Guidance(rule=FAMILIES[name].guidance_rule if active else "none", scale=scale)


def test_an_unknown_pipeline_lists_the_known_ones() -> None:
    assert family_of_pipeline("ZImagePipeline").name == "z_image"
    with pytest.raises(UnsupportedModelError, match=r"QwenImagePipeline.*ZImagePipeline"):
        family_of_pipeline("WanPipeline")
