"""What is fixed for a family, a checkpoint and a size: defaults, the facts that shape latents, and their shapes."""

from __future__ import annotations

from dataclasses import dataclass

from flowroll.types import Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request leaves open. Sizes in pixels."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: Number
    negative_prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts of a loaded checkpoint that shape its latents.

    Attributes:
        latent_channels: Channels of the VAE's latents.
        vae_scale_factor: Pixels per latent cell along one side.
        text_width: Width of the text embeddings that the transformer takes.
        max_tokens_per_side: Rows and columns of patches that the position table covers; None: no limit in practice.
    """

    latent_channels: int
    vae_scale_factor: int
    text_width: int
    max_tokens_per_side: tuple[int, int] | None = None

    @property
    def pixel_unit(self) -> int:
        """Height and width must be multiples of this: one patch of 2 x 2 latent cells."""
        return 2 * self.vae_scale_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The shapes of one sample of a given size.

    Attributes:
        height: Pixels.
        width: Pixels.
        rows: Rows of patches.
        columns: Columns of patches.
        noise_shape: What the pipeline draws, at batch 1.
        latent_shape: One sample's latents in the denoising loop, without batch dimension.
    """

    height: int
    width: int
    rows: int
    columns: int
    noise_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Image tokens, before any padding inside the model."""
        return self.rows * self.columns
