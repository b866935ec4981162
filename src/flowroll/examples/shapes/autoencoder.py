"""Trains a pipeline's VAE on the pictures of the world."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flowroll.examples.shapes.descent import minimise
from flowroll.examples.shapes.world import GROUND, SCENES, draw

# Of the penalty that keeps latents near 0.
_PULL = 0.01
_SHAPE_WEIGHT = 5.0
# Added to the latents of a picture, so that the decoder forgives what a denoiser gets a little wrong.
_LATENT_NOISE = 0.1


def pictures(count: int, generator: torch.Generator) -> tuple[Float[Tensor, "batch 3 height width"], list[int]]:
    """Pictures of random scenes, values in [-1, 1], and the index of each one's scene."""
    scenes = torch.randint(len(SCENES), (count,), generator=generator).tolist()
    return torch.stack([draw(SCENES[index], generator) for index in scenes]) * 2 - 1, scenes


def train(
    vae: AutoencoderKL | AutoencoderKLQwenImage,
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> None:
    """Trains the VAE in place, then sets the numbers with which the pipeline brings its latents to mean 0 and std 1.

    Args:
        vae: An `AutoencoderKL` or an `AutoencoderKLQwenImage`.
        steps: Optimizer steps.
        batch: Pictures per step.
        generator: The source of scenes and noise.
        report: Called with the step and the loss.
    """

    def loss() -> Tensor:
        images, _ = pictures(batch, generator)
        posterior = vae.encode(_frames(vae, images)).latent_dist
        latents = posterior.mean + _LATENT_NOISE * torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(latents).sample.reshape(images.shape)
        # The ground is most of a picture, and the easy part.
        weight = 1 + _SHAPE_WEIGHT * (images - (2 * GROUND - 1)).abs().amax(dim=1, keepdim=True)
        error = weight * (decoded - images)
        found: Tensor = (error * (decoded - images)).mean() + 0.2 * error.abs().mean() + _PULL * posterior.mean.square().mean()
        return found

    _flatten_time(vae)
    minimise(vae, loss, steps=steps, weight_decay=0.0, report=report)
    _restore_time(vae)
    _set_scale(vae, generator)


@torch.no_grad()
def encode(
    vae: AutoencoderKL | AutoencoderKLQwenImage, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch channels rows columns"]:
    """The latents of pictures in [-1, 1], brought to mean 0 and std 1 as the denoiser sees them."""
    means: Tensor = vae.encode(_frames(vae, images)).latent_dist.mean
    if isinstance(vae, AutoencoderKLQwenImage):
        shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
        scaled: Tensor = (means[:, :, 0] - shift) / scale
    else:
        scaled = (means - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled


@torch.no_grad()
def _set_scale(vae: AutoencoderKL | AutoencoderKLQwenImage, generator: torch.Generator) -> None:
    means = vae.encode(_frames(vae, pictures(256, generator)[0])).latent_dist.mean
    if isinstance(vae, AutoencoderKLQwenImage):
        dims = (0, 2, 3, 4)
        vae.register_to_config(latents_mean=means.mean(dims).tolist(), latents_std=means.std(dims).tolist())
    else:
        vae.register_to_config(shift_factor=float(means.mean()), scaling_factor=float(1 / means.std()))


def _flatten_time(vae: nn.Module) -> None:
    """Runs convolutions over time in two dimensions: before a video's first frame there are zeros, which weigh nothing.

    The last slice of a kernel is what meets the frame; the others are never trained. Four times as fast on a CPU.
    """

    def run(convolution: Any, frame: Tensor, cache: None = None) -> Tensor:
        assert frame.shape[2] == 1 and cache is None
        left, _, top, _, _, _ = convolution._padding
        kernel, stride = convolution.weight[:, :, -1], convolution.stride[1:]
        return F.conv2d(frame[:, :, 0], kernel, convolution.bias, stride=stride, padding=(top, left)).unsqueeze(2)

    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = functools.partial(run, module)  # type: ignore[method-assign]


def _restore_time(vae: nn.Module) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            del module.forward


def _frames(vae: AutoencoderKL | AutoencoderKLQwenImage, images: Tensor) -> Tensor:
    """As the VAE takes them: Qwen-Image's is a video's, with one frame."""
    return images[:, :, None] if isinstance(vae, AutoencoderKLQwenImage) else images
