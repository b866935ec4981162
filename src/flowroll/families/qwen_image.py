"""Qwen-Image: packed tokens [S, 64], true CFG rescaled to the conditional norm token by token.

Conventions of diffusers' `QwenImagePipeline` (0.42): initial noise in the model's dtype; the timestep is rounded to that dtype
and divided by 1000; guidance runs above a scale of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import UnsupportedModelError
from flowroll.families.base import Family, Prompt, StepInput, encoder_device
from flowroll.families.conditioning import TEXT_LENGTHS, TOKENS, Argument, Conditioning, ConditioningField, Output
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.packing import pack, unpack
from flowroll.sampling.schedule import ScheduleConfig, linspace_float64
from flowroll.types import EnvValue, Gather, Number, ParallelPlan, Region, Split
from flowroll.types.prompts import MASK


class QwenImage(Family):
    """The family of Qwen/Qwen-Image and of other checkpoints with its pipeline class."""

    name: ClassVar[str] = "qwen_image"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    variants: ClassVar[Mapping[str, Defaults]] = {
        "base": Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0, negative_prompt=" "),
        "shapes": Defaults(height=64, width=64, num_inference_steps=8, guidance_scale=4.0, negative_prompt=" "),
    }
    guidance_rule: ClassVar[str] = "cfg_norm_rescale"
    guided_above: ClassVar[Number] = 1
    conditioning: ClassVar[Conditioning] = Conditioning(
        latents=Argument(name="hidden_states"),
        fields=(
            # The mask says nothing of the padding of a shared forward: texts that come with one are not padded further.
            ConditioningField(
                name="encoder_hidden_states", shape=(TOKENS, "text"), may_be_padded=True, is_listed_by_sglang=True
            ),
            ConditioningField(
                name="encoder_hidden_states_mask", shape=(TOKENS,), dtype="index", is_required=False, sent_as=MASK
            ),
            ConditioningField(name="img_shapes", source="size", batch="list"),
            TEXT_LENGTHS,
        ),
    )
    # The image's rows are sharded from `img_in` to `proj_out`; the text stream, few rows that every image row attends to, is
    # computed by every rank. The joint attention sees [text, image].
    parallel_plan: ClassVar[ParallelPlan] = ParallelPlan(
        regions=(
            Region(
                enter=Split(module="img_in", rows=1),
                follow=(Split(module="pos_embed", item=0, rows=0),),
                leave=Gather(module="proj_out", rows=1),
                attention="transformer_blocks.*.attn",
            ),
        ),
        columns=(
            "transformer_blocks.*.img_mod.1",
            "transformer_blocks.*.txt_mod.1",
            "transformer_blocks.*.attn.to_q",
            "transformer_blocks.*.attn.to_k",
            "transformer_blocks.*.attn.to_v",
            "transformer_blocks.*.attn.to_out.0",
            "transformer_blocks.*.attn.add_q_proj",
            "transformer_blocks.*.attn.add_k_proj",
            "transformer_blocks.*.attn.add_v_proj",
            "transformer_blocks.*.attn.to_add_out",
            "transformer_blocks.*.img_mlp.net.0.proj",
            "transformer_blocks.*.img_mlp.net.2",
            "transformer_blocks.*.txt_mlp.net.0.proj",
            "transformer_blocks.*.txt_mlp.net.2",
            "norm_out.linear",
        ),
    )

    modulation: ClassVar[tuple[str, ...]] = ("transformer_blocks.*.img_mod", "transformer_blocks.*.txt_mod", "norm_out.linear")

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        for option in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(option):
                raise UnsupportedModelError(
                    f"transformer option {option} must be false for {self.name}, got true; use a text-to-image checkpoint."
                )
        return ModelSpec(
            latent_channels=config.in_channels // 4,
            vae_scale_factor=pipeline.vae_scale_factor,
            widths={"text": config.joint_attention_dim},
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        rows, columns = height // spec.pixel_unit, width // spec.pixel_unit
        return Geometry(
            height=height,
            width=width,
            rows=rows,
            columns=columns,
            noise_shape=(1, 1, spec.latent_channels, 2 * rows, 2 * columns),
            latent_shape=(rows * columns, 4 * spec.latent_channels),
        )

    @override
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        return linspace_float64(num_steps)

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        return pack(noise[0, 0])

    @override
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        return timesteps.to(dtype) / 1000

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        embeds, mask = pipeline.encode_prompt(
            prompt.text, device=encoder_device(pipeline), max_sequence_length=self.max_text_tokens
        )
        branch: dict[str, EnvValue] = {"encoder_hidden_states": embeds[0]}
        if mask is not None:
            branch["encoder_hidden_states_mask"] = mask[0]
        return branch

    @override
    def size_arguments(self, geometry: Geometry, num_tokens: int) -> Mapping[str, EnvValue]:
        return {"img_shapes": [[[1, geometry.rows, geometry.columns]]]}

    @override
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        positive, *rest = cast("Sequence[Tensor]", outputs)
        return self.guide(positive, rest[0], one.guidance.scale)[0] if rest else positive[0]

    @staticmethod
    def guide(
        positive: Float[Tensor, " batch tokens channels"], negative: Float[Tensor, " batch tokens channels"], scale: Number
    ) -> Float[Tensor, " batch tokens channels"]:
        """Computes neg + scale (pos - neg), with each token rescaled to the norm of its conditional velocity.

        A token whose two branches cancel exactly has no direction to rescale; it gives 0/0 here as in the pipeline.
        """
        combined = negative + scale * (positive - negative)
        rescale = torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True)
        return cast(Tensor, combined * rescale)

    @override
    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        """Compares the norms of the tokens: guidance keeps each token's conditional norm, whatever the other branch is.

        Measured on small models: with another negative prompt the norms differ by rounding alone (5e-8 of the norm in float32;
        2e-3 to 3e-3 in bfloat16, where the velocities move 100 times as far or more). With another prompt they differ by 5e-3
        or more in float32, and the velocities move 11 to 55 times as far; with other weights 11 to 20 times.
        """
        positive = cast(Tensor, outputs[0])[0]
        norms = positive.float().norm(dim=-1)
        moved = (velocity - self.apply_guidance(outputs, one).float()).norm(dim=-1)
        stretched = (velocity.norm(dim=-1) - norms).abs()
        is_rounding = bool(stretched.mean() < 8 * torch.finfo(positive.dtype).eps * norms.mean())
        return is_rounding and bool(moved.mean() > 75 * stretched.mean())

    @override
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        vae = pipeline.vae
        channels = latents.shape[-1] // 4
        cells = unpack(latents, geometry.rows, geometry.columns)[None, :, None].to(vae.dtype)

        def per_channel(values: list[float]) -> Tensor:
            return torch.tensor(values).view(1, channels, 1, 1, 1)

        shift = per_channel(vae.config.latents_mean).to(cells.device, cells.dtype)
        # The pipeline divides by the rounded inverse; multiplying by the std would differ in the last bit.
        inverse_std = 1.0 / per_channel(vae.config.latents_std).to(cells.device, cells.dtype)
        return cells / inverse_std + shift
