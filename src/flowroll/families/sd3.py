"""Stable Diffusion 3 and 3.5: latents [16, H/8, W/8], three text encoders, both branches in one batch of two.

Conventions of diffusers' `StableDiffusion3Pipeline` (0.42): initial noise in the model's dtype; the model is given the
schedule's timestep in float32 as it is; guidance neg + scale (pos - neg) runs above a scale of 1, in the model's dtype, with
the unconditional branch in front. The text is that of two CLIP encoders, side by side and filled up to T5's width, followed by
T5's; where T5 was not saved, zeros stand in for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import UnsupportedModelError
from flowroll.families.base import DtypeRule, Family, Prompt, StepInput, encoder_device
from flowroll.families.conditioning import Argument, Conditioning, ConditioningField, Output
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.guidance import fits_positive, guide
from flowroll.sampling.schedule import ScheduleConfig, scheduler_grid
from flowroll.types import EnvValue, Gather, Number, ParallelPlan, Region, Split
from flowroll.types.prompts import POOLED

# The pipeline's default length of T5's text, and of the zeros that stand in for it.
_T5_TOKENS = 256
_BLOCK = "transformer_blocks.*"


class StableDiffusion3(Family):
    """The family of Stable Diffusion 3 and 3.5 large, and of 3.5 medium, which has other defaults and dual attention."""

    name: ClassVar[str] = "sd3"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional_components: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    variants: ClassVar[Mapping[str, Defaults]] = {
        "base": Defaults(height=1024, width=1024, num_inference_steps=28, guidance_scale=7.0, negative_prompt=""),
        "3.5-medium": Defaults(height=1024, width=1024, num_inference_steps=40, guidance_scale=4.5, negative_prompt=""),
        "shapes": Defaults(height=64, width=64, num_inference_steps=8, guidance_scale=4.0, negative_prompt=""),
    }
    guidance_rule: ClassVar[str] = "cfg_batch"
    guided_above: ClassVar[Number] = 1
    timesteps_in: ClassVar[DtypeRule] = "float32"
    conditioning: ClassVar[Conditioning] = Conditioning(
        latents=Argument(name="hidden_states"),
        pair=("negative", "positive"),
        fields=(
            ConditioningField(name="encoder_hidden_states", shape=("text_tokens", "text")),
            ConditioningField(name="pooled_projections", shape=("pooled",), sent_as=POOLED),
        ),
    )
    # As in Qwen-Image, but the joint attention sees [image, text]. The modulation is computed for both rows of the pair, as the
    # pipeline does, and one row is used.
    parallel_plan: ClassVar[ParallelPlan] = ParallelPlan(
        regions=(
            Region(
                enter=Split(module="pos_embed", rows=1, branches=0),
                follow=(
                    Split(module="context_embedder", branches=0),
                    Split(module=f"{_BLOCK}.norm1*.linear", branches=0),
                    Split(module="norm_out.linear", branches=0),
                ),
                leave=Gather(module="proj_out", rows=1, branches=0),
                attention=f"{_BLOCK}.attn*",
                sliced=(f"{_BLOCK}.attn.to_out.0", f"{_BLOCK}.attn.to_add_out"),
                is_in_front=True,
            ),
        ),
        columns=(
            f"{_BLOCK}.norm1*.linear",
            f"{_BLOCK}.attn*.to_[qkv]",
            f"{_BLOCK}.attn*.to_out.0",
            f"{_BLOCK}.attn.add_[qkv]_proj",
            f"{_BLOCK}.attn.to_add_out",
            f"{_BLOCK}.ff*.net.0.proj",
            f"{_BLOCK}.ff*.net.2",
            "norm_out.linear",
        ),
    )

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        if config.out_channels not in (None, config.in_channels):
            raise UnsupportedModelError(
                f"out_channels must be in_channels = {config.in_channels} for {self.name}, got {config.out_channels}; use a "
                "text-to-image checkpoint."
            )
        return ModelSpec(
            latent_channels=config.in_channels,
            vae_scale_factor=pipeline.vae_scale_factor,
            widths={
                "text_tokens": pipeline.tokenizer_max_length + _T5_TOKENS,
                "text": config.joint_attention_dim,
                "pooled": config.pooled_projection_dim,
            },
            patch_size=config.patch_size,
            max_tokens_per_side=(config.pos_embed_max_size, config.pos_embed_max_size),
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        shape = (spec.latent_channels, height // spec.vae_scale_factor, width // spec.vae_scale_factor)
        return Geometry(
            height=height,
            width=width,
            rows=height // spec.pixel_unit,
            columns=width // spec.pixel_unit,
            noise_shape=(1, *shape),
            latent_shape=shape,
        )

    @override
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        return scheduler_grid(config, num_steps)

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        return noise[0]

    @override
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        return timesteps.to(dtype)

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt.text,
            None,
            None,
            device=encoder_device(pipeline),
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS,
        )
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    @override
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        (found,) = cast("Sequence[Tensor]", outputs)
        return guide(found[0], found[1], one.guidance.scale) if len(found) == 2 else found[0]

    @override
    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        (found,) = cast("Sequence[Tensor]", outputs)
        return fits_positive(found[1], velocity, one.guidance.scale)

    @override
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        vae = pipeline.vae
        cells = latents[None] / vae.config.scaling_factor + vae.config.shift_factor
        return cells.to(vae.dtype)  # type: ignore[no-any-return]
