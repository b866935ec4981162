"""The facts of a family, a checkpoint and an image size: defaults, what shapes the latents, and their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flowroll.types import Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The values of what a request leaves open.

    Attributes:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        num_inference_steps: Number of transitions T.
        guidance_scale: The scale of classifier-free guidance; where there are two scales, the one that the model is given.
        negative_prompt: Text of the unconditional branch; None: there is no such branch unless the request has a text for it.
        true_cfg_scale: The scale of classifier-free guidance where there are two scales; None: there is one.
        max_text_tokens: The number of tokens at which a prompt is cut; None: the family's.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: Number
    negative_prompt: str | None
    true_cfg_scale: Number | None = None
    max_text_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFacts:
    """How many tokens of a prompt stand for an image, for a text encoder that sees images.

    Attributes:
        token_id: The id that stands for a part of an image.
        placeholders: The texts that stand for an image or a video, which the processor would look for.
        side: The side of that part, in pixels of the resized image.
        min_pixels: The least pixels to which an image is resized.
        max_pixels: The most pixels to which an image is resized.
    """

    token_id: int
    placeholders: tuple[str, ...]
    side: int
    min_pixels: int
    max_pixels: int

    def num_tokens(self, height: int, width: int) -> int:
        """Returns the number of tokens of an image that the processor is given.

        Sides are rounded to multiples of `side`, and scaled until the pixels are within the limits.

        Reference: `smart_resize` of transformers' Qwen2-VL.
        """
        rows, columns = round(height / self.side), round(width / self.side)
        pixels = rows * columns * self.side**2
        if pixels > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(value / scale / self.side)) for value in (height, width))
        elif pixels < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(value * scale / self.side) for value in (height, width))
        return rows * columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts of a loaded checkpoint that shape its latents.

    Attributes:
        latent_channels: Channels of the VAE's latents.
        vae_scale_factor: Pixels per latent cell along one side.
        widths: Sizes of the checkpoint's conditioning tensors, by the names that the family's declaration uses.
        patch_size: Latent cells per token along one side.
        embeds_guidance: Whether the transformer takes the guidance scale as an input.
        rope_axes: Widths of the axes of the rotary embedding, for a family whose forwards take position ids.
        colors: Channels of a picture: 3, or 4 with an alpha channel.
        sample_sigmas: The grid before the shift that the checkpoint is sampled with, where it has one of its own.
        max_tokens_per_side: Rows and columns of patches that the position table covers; None: no limit in practice.
        max_images: The most reference images of a request, which then has at least one; 0: it has none.
        vision: How the text encoder sees them; None: it does not.
    """

    latent_channels: int
    vae_scale_factor: int
    widths: Mapping[str, int]
    patch_size: int = 2
    embeds_guidance: bool = False
    rope_axes: tuple[int, ...] | None = None
    max_tokens_per_side: tuple[int, int] | None = None
    colors: int = 3
    sample_sigmas: tuple[float, ...] | None = None
    max_images: int = 0
    vision: VisionFacts | None = None

    @property
    def pixel_unit(self) -> int:
        """The pixels of one token along one side, of which height and width must be multiples."""
        return self.patch_size * self.vae_scale_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The shapes of one sample of a given size.

    Attributes:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        rows: Number of rows of patches.
        columns: Number of columns of patches.
        noise_shape: The shape of the noise that the pipeline draws at batch 1.
        latent_shape: The shape of one sample's latents in the denoising loop, without batch dimension.
        colors: Channels of the decoded sample: 3, or 4 with an alpha channel.
        frames: Number of frames of the decoded sample.
        latent_frames: Number of latent frames in time, each with its rows and columns of patches.
        references: The rows and columns of patches of each reference image.
    """

    height: int
    width: int
    rows: int
    columns: int
    noise_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    colors: int = 3
    frames: int = 1
    latent_frames: int = 1
    references: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """The number of image tokens of the sample itself, before any padding inside the model."""
        return self.latent_frames * self.rows * self.columns

    @property
    def num_reference_tokens(self) -> int:
        """The number of tokens of all reference images together."""
        return sum(rows * columns for rows, columns in self.references)
