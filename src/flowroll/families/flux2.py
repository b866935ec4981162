"""FLUX.2 klein, base and distilled, and FLUX.2 dev: packed tokens [S, 128], hidden states of a decoder, 4-D position ids.

Conventions of diffusers' `Flux2KleinPipeline` and `Flux2Pipeline` (0.42): initial noise in the model's dtype, drawn in the
shape of packed cells; the timestep is rounded to that dtype and divided by 1000; the shift of the schedule depends on the
number of steps too. A text is filled up to 512 tokens, and the hidden states of three layers stand side by side. Position ids
are integers (frame, row, column, place in the text). The VAE normalizes latents with the statistics of a batch norm.

klein-base has classifier-free guidance neg + scale (pos - neg) above a scale of 1: two forwards, in the model's dtype. klein
was distilled to one forward. dev is given its scale as an input, in one forward too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import UnsupportedModelError
from flowroll.families.base import Prompt, encoder_device
from flowroll.families.conditioning import IMAGE_TOKENS, TOKENS, Argument, Conditioning, ConditioningField
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.packing import unpack
from flowroll.families.rotary import RotaryTable, image_ids
from flowroll.families.true_cfg import TrueCfgFamily
from flowroll.sampling.schedule import ScheduleConfig, linspace_float64
from flowroll.types import EnvValue, Gather, ParallelPlan, Region, Split

_KLEIN, _DEV = "Flux2KleinPipeline", "Flux2Pipeline"
_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
# Of both kinds of blocks.
_BLOCK = f"*{_DOUBLE}"
_THETA = 2000


def _position_ids(num_text: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns the positions: text tokens stand at (0, 0, 0, their number), image tokens at (0, row, column, 0)."""
    text = torch.zeros(num_text, 4, dtype=torch.int64)
    text[:, 3] = torch.arange(num_text)
    return text, torch.nn.functional.pad(image_ids(rows, columns), (0, 1))


def _check_layers(text_encoder: Any, last: int) -> None:
    """Refuses a text encoder without the last layer that the pipeline reads; there is none where a model is outlined."""
    layers = last if text_encoder is None else text_encoder.config.get_text_config().num_hidden_layers
    if layers < last:
        raise UnsupportedModelError(
            f"text_encoder must have at least {last} layers, of which the last is read, got {layers}; use the one that the "
            "transformer was trained with."
        )


class Flux2(TrueCfgFamily):
    """The family of FLUX.2-klein-base, of the distilled FLUX.2-klein, and of FLUX.2-dev."""

    name: ClassVar[str] = "flux2"
    pipeline_classes: ClassVar[tuple[str, ...]] = (_KLEIN, _DEV)
    variants: ClassVar[Mapping[str, Defaults]] = {
        "klein-base": Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0, negative_prompt=""),
        "klein": Defaults(
            height=1024,
            width=1024,
            num_inference_steps=4,
            guidance_scale=1.0,
            negative_prompt=None,
            true_cfg_scale=1.0,
        ),
        "dev": Defaults(
            height=1024,
            width=1024,
            num_inference_steps=50,
            guidance_scale=4.0,
            negative_prompt=None,
            true_cfg_scale=1.0,
        ),
    }
    conditioning: ClassVar[Conditioning] = Conditioning(
        # As the pipeline's latents lie. The first product has other bits where 2 to 7 tokens lie one after the other (measured
        # with torch 2.13 on CPU in float32).
        latents=Argument(name="hidden_states", is_transposed=True),
        table=RotaryTable(name="freqs_cis", text="txt_ids", image="img_ids", theta=_THETA, ids=_position_ids),
        fields=(
            ConditioningField(name="encoder_hidden_states", shape=(TOKENS, "text")),
            ConditioningField(name="txt_ids", source="size", shape=(TOKENS, 4), dtype="index", batch="shared"),
            ConditioningField(name="img_ids", source="size", shape=(IMAGE_TOKENS, 4), dtype="index", batch="shared"),
            ConditioningField(name="guidance", source="scale", shape=(), dtype="float32", is_required=False),
        ),
    )
    # As in FLUX.1, but the rotary tables of image and text are made one after the other.
    parallel_plan: ClassVar[ParallelPlan] = ParallelPlan(
        regions=(
            Region(
                enter=Split(module="x_embedder", rows=1),
                follow=(
                    Split(module="pos_embed", item=0, rows=0, call=0),
                    Split(module="pos_embed", item=1, rows=0, call=0),
                ),
                leave=Gather(module="proj_out", rows=1),
                attention=f"{_BLOCK}.attn",
            ),
        ),
        columns=(
            "double_stream_modulation_*.linear",
            "single_stream_modulation.linear",
            f"{_DOUBLE}.attn.to_[qkv]",
            f"{_DOUBLE}.attn.to_out.0",
            f"{_DOUBLE}.attn.add_[qkv]_proj",
            f"{_DOUBLE}.attn.to_add_out",
            f"{_DOUBLE}.ff*.linear_*",
            f"{_SINGLE}.attn.to_qkv_mlp_proj",
            f"{_SINGLE}.attn.to_out",
            "norm_out.linear",
        ),
    )

    @override
    def variants_of(self, index: Mapping[str, object]) -> Sequence[str]:
        if index["_class_name"] == _DEV:
            return ["dev"]
        return ["klein" if index.get("is_distilled") else "klein-base"]

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        wanted = (
            ("patch_size", config.patch_size, 1),
            ("out_channels", config.out_channels or config.in_channels, config.in_channels),
            ("in_channels", config.in_channels, pipeline.vae.bn.num_features),
            ("rope_theta", config.rope_theta, _THETA),
        )
        self.check_options(wanted, "use a text-to-image checkpoint")
        # The pipeline of klein, which alone has this option, gives its model no scale.
        is_klein = "is_distilled" in pipeline.config
        _check_layers(pipeline.text_encoder, 27 if is_klein else 30)
        return ModelSpec(
            latent_channels=config.in_channels // 4,
            vae_scale_factor=pipeline.vae_scale_factor,
            widths={"text": config.joint_attention_dim},
            embeds_guidance=config.guidance_embeds and not is_klein,
            rope_axes=tuple(config.axes_dims_rope),
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        rows, columns = height // spec.pixel_unit, width // spec.pixel_unit
        packed = 4 * spec.latent_channels
        return Geometry(
            height=height,
            width=width,
            rows=rows,
            columns=columns,
            noise_shape=(1, packed, rows, columns),
            latent_shape=(rows * columns, packed),
        )

    @override
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        return linspace_float64(num_steps)

    @override
    def shift_exponent(self, config: ScheduleConfig, geometry: Geometry, num_steps: int) -> float:
        """Returns the exponent that was fitted to the number of tokens n, at 10 and 200 steps and linear between and beyond.

        Above 4,300 tokens it is that of 200 steps. Reference: `compute_empirical_mu` of black-forest-labs/flux2 and diffusers.
        """
        tokens = geometry.num_tokens
        at_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return at_200
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        slope = (at_200 - at_10) / 190.0
        return slope * num_steps + (at_200 - 200.0 * slope)

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        # Not copied: the latents lie as those of the pipeline, step by step.
        return noise[0].flatten(1).T

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        embeds, _ = pipeline.encode_prompt(
            prompt.text, device=encoder_device(pipeline), max_sequence_length=self.max_text_tokens
        )
        return {"encoder_hidden_states": embeds[0]}

    @override
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        vae = pipeline.vae
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        tokens = latents * std.to(latents) + vae.bn.running_mean.to(latents)
        cells = unpack(tokens, geometry.rows, geometry.columns)[None]
        return cells.to(vae.dtype)
