"""FLUX.1 dev and schnell: packed tokens [S, 64], T5's text, CLIP's pooled projection, a guidance scale that the model is given.

Conventions of diffusers' `FluxPipeline` (0.42): initial noise in the model's dtype; the timestep is rounded to that dtype and
divided by 1000. The guidance scale is an input of the model (of dev; schnell takes none). Classifier-free guidance
neg + scale (pos - neg) is beside it, with a scale of its own, `true_cfg_scale`: two forwards, in the model's dtype, where that
scale is above 1 and the request has a negative prompt. Position ids have the model's dtype, and all samples of a batch share
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.families.base import Prompt, encoder_device
from flowroll.families.conditioning import IMAGE_TOKENS, TOKENS, Argument, Conditioning, ConditioningField
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.packing import pack, unpack
from flowroll.families.rotary import RotaryTable, image_ids
from flowroll.families.true_cfg import TrueCfgFamily
from flowroll.sampling.schedule import ScheduleConfig, linspace_float64
from flowroll.types import EnvValue, Gather, ParallelPlan, Region, Split
from flowroll.types.prompts import POOLED

_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
# Of both kinds of blocks.
_BLOCK = f"*{_DOUBLE}"


def _position_ids(num_text: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns the positions: text tokens stand at 0, image tokens at (0, row, column)."""
    return torch.zeros(num_text, 3), image_ids(rows, columns).float()


class Flux(TrueCfgFamily):
    """The family of FLUX.1-dev and, as the variant "schnell", of FLUX.1-schnell, which was distilled to four steps."""

    name: ClassVar[str] = "flux"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    variants: ClassVar[Mapping[str, Defaults]] = {
        "dev": Defaults(
            height=1024,
            width=1024,
            num_inference_steps=28,
            guidance_scale=3.5,
            negative_prompt=None,
            true_cfg_scale=1.0,
        ),
        "schnell": Defaults(
            height=1024,
            width=1024,
            num_inference_steps=4,
            guidance_scale=0.0,
            negative_prompt=None,
            true_cfg_scale=1.0,
            max_text_tokens=256,
        ),
    }
    conditioning: ClassVar[Conditioning] = Conditioning(
        latents=Argument(name="hidden_states"),
        table=RotaryTable(name="freqs_cis", text="txt_ids", image="img_ids", theta=10_000, ids=_position_ids),
        fields=(
            ConditioningField(name="encoder_hidden_states", shape=(TOKENS, "text")),
            ConditioningField(name="pooled_projections", shape=("pooled",), sent_as=POOLED),
            ConditioningField(name="txt_ids", source="size", shape=(TOKENS, 3), batch="shared"),
            ConditioningField(name="img_ids", source="size", shape=(IMAGE_TOKENS, 3), batch="shared"),
            ConditioningField(name="guidance", source="scale", shape=(), dtype="float32", is_required=False),
        ),
    )
    # The image's rows are sharded from `x_embedder` to `proj_out`; every rank computes the text's. The attention of both kinds
    # of blocks sees [text, image], as the rotary table does.
    parallel_plan: ClassVar[ParallelPlan] = ParallelPlan(
        regions=(
            Region(
                enter=Split(module="x_embedder", rows=1),
                follow=(
                    Split(module="pos_embed", item=0, rows=0, is_behind_others=True),
                    Split(module="pos_embed", item=1, rows=0, is_behind_others=True),
                ),
                leave=Gather(module="proj_out", rows=1),
                attention=f"{_BLOCK}.attn",
            ),
        ),
        columns=(
            f"{_DOUBLE}.norm1*.linear",
            f"{_SINGLE}.norm.linear",
            f"{_BLOCK}.attn.to_[qkv]",
            f"{_DOUBLE}.attn.to_out.0",
            f"{_DOUBLE}.attn.add_[qkv]_proj",
            f"{_DOUBLE}.attn.to_add_out",
            f"{_DOUBLE}.ff*.net.0.proj",
            f"{_DOUBLE}.ff*.net.2",
            f"{_SINGLE}.proj_mlp",
            f"{_SINGLE}.proj_out",
            "norm_out.linear",
        ),
    )

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        channels = config.out_channels or config.in_channels
        wanted = (("patch_size", config.patch_size, 1), ("out_channels", channels, config.in_channels))
        self.check_options(wanted, "use a text-to-image checkpoint")
        return ModelSpec(
            latent_channels=config.in_channels // 4,
            vae_scale_factor=pipeline.vae_scale_factor,
            widths={"text": config.joint_attention_dim, "pooled": config.pooled_projection_dim},
            embeds_guidance=config.guidance_embeds,
            rope_axes=tuple(config.axes_dims_rope),
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        rows, columns = height // spec.pixel_unit, width // spec.pixel_unit
        return Geometry(
            height=height,
            width=width,
            rows=rows,
            columns=columns,
            noise_shape=(1, spec.latent_channels, 2 * rows, 2 * columns),
            latent_shape=(rows * columns, 4 * spec.latent_channels),
        )

    @override
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        return linspace_float64(num_steps)

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        return pack(noise[0])

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        most = prompt.max_tokens or self.max_text_tokens
        embeds, pooled, _ = pipeline.encode_prompt(prompt.text, device=encoder_device(pipeline), max_sequence_length=most)
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    @override
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        vae = pipeline.vae
        cells = unpack(latents, geometry.rows, geometry.columns)[None] / vae.config.scaling_factor + vae.config.shift_factor
        return cells.to(vae.dtype)  # type: ignore[no-any-return]
