"""Z-Image and Z-Image-Turbo: latents [16, H/8, W/8] in float32, list inputs, output negated.

Conventions of diffusers' `ZImagePipeline` (0.42): initial noise in float32; the model's timestep is (1000 - t) / 1000 in
float32; guidance pos + scale (pos - neg) runs above a scale of 0, and both branches go through the model as one pair (two
rows of modulation, the shorter caption padded to the longer), which is therefore what replay has to run as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import UnsupportedModelError
from flowroll.families.base import MAX_TEXT_TOKENS, Defaults, Family, Geometry, Guidance, ModelSpec, Transformer
from flowroll.sampling.schedule import linspace_float32
from flowroll.types import DenoisingEnv, EnvValue, Number


class ZImage(Family):
    """Tongyi-MAI/Z-Image and, as the variant "turbo", Z-Image-Turbo."""

    name: ClassVar[str] = "z_image"
    pipeline_class: ClassVar[str] = "ZImagePipeline"
    variants: ClassVar[Mapping[str, Defaults]] = {
        "base": Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0, negative_prompt=""),
        "turbo": Defaults(height=1024, width=1024, num_inference_steps=9, guidance_scale=0.0, negative_prompt=""),
    }
    guidance_rule: ClassVar[str] = "cfg_pair"
    embeds_key: ClassVar[str] = "cap_feats"
    env_schema: ClassVar[Mapping[str, str]] = {"txt_seq_lens": "[L], metadata; never passed to the transformer"}

    @override
    def guides(self, scale: Number) -> bool:
        return scale > 0

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        text_positions, rows, columns = config.axes_lens
        # Captions take positions 1..512, the image the one after them.
        needed = MAX_TEXT_TOKENS + 2
        if text_positions < needed:
            raise UnsupportedModelError(
                f"axes_lens[0] must be at least {needed} for {self.name}, got {text_positions}; use a full position table."
            )
        if config.siglip_feat_dim is not None:
            raise UnsupportedModelError(
                f"siglip_feat_dim must be null for {self.name}, got {config.siglip_feat_dim}; use a text-to-image checkpoint."
            )
        return ModelSpec(
            latent_channels=config.in_channels,
            vae_scale_factor=pipeline.vae_scale_factor,
            max_tokens_per_side=(rows, columns),
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        rows, columns = height // spec.pixel_unit, width // spec.pixel_unit
        shape = (spec.latent_channels, 2 * rows, 2 * columns)
        return Geometry(height=height, width=width, rows=rows, columns=columns, noise_shape=(1, *shape), latent_shape=shape)

    @override
    def base_grid(self, num_steps: int) -> Float[Tensor, " steps"]:
        return linspace_float32(num_steps)

    @override
    def noise_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        return noise[0]

    @override
    def timestep_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    @override
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        return (1000 - timesteps.to(dtype)) / 1000

    @override
    def encode(self, pipeline: Any, prompt: str) -> Mapping[str, EnvValue]:
        embeds, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=MAX_TEXT_TOKENS)
        return {self.embeds_key: embeds[0]}

    @override
    def velocity(
        self,
        transformer: Transformer,
        latents: Float[Tensor, " *latent"],
        timestep: Float[Tensor, " 1"],
        env: DenoisingEnv,
        guidance: Guidance,
        dtype: torch.dtype,
    ) -> Float[Tensor, " *latent"]:
        branches = [env.positive(self.embeds_key)]
        if guidance.is_active:
            branches.append(env.negative(self.embeds_key))
        frames = [latents.to(dtype).unsqueeze(1)] * len(branches)
        outputs = transformer(frames, timestep.repeat(len(branches)), branches, return_dict=False)[0]
        return -self.combine([output.float() for output in outputs], guidance.scale).squeeze(1)

    @staticmethod
    def combine(branches: list[Float[Tensor, " *latent"]], scale: Number) -> Float[Tensor, " *latent"]:
        """Pos + scale (pos - neg), in float32; the conditional branch where it is alone."""
        if len(branches) == 1:
            return branches[0]
        positive, negative = branches
        return positive + scale * (positive - negative)

    @override
    def decode(
        self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry
    ) -> Float[Tensor, " 3 1 height width"]:
        vae = pipeline.vae
        cells = latents[None].to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(cells, return_dict=False)[0]
        return self.picture(pipeline, image)
