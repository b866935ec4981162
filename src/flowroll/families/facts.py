"""The facts of a family, a checkpoint and an image size: defaults, what shapes the latents, and their shapes."""

from __future__ import annotations

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

    @property
    def num_tokens(self) -> int:
        """The number of image tokens, before any padding inside the model."""
        return self.latent_frames * self.rows * self.columns
