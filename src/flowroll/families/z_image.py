"""Z-Image and Z-Image-Turbo: latents [16, H/8, W/8] in float32, list inputs, output negated.

Conventions of diffusers' `ZImagePipeline` (0.42): initial noise in float32; the model's timestep is (1000 - t) / 1000 in
float32; guidance pos + scale (pos - neg) runs above a scale of 0, and both branches go through the model as one pair (two
rows of modulation, the shorter caption padded to the longer), which is therefore what replay has to run as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import UnsupportedModelError
from flowroll.families.base import DtypeRule, Family, Prompt, StepInput, encoder_device
from flowroll.families.conditioning import TEXT_LENGTHS, TOKENS, Argument, Conditioning, ConditioningField, Output
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.guidance import neighbors, reached
from flowroll.sampling.schedule import ScheduleConfig, linspace_float32
from flowroll.types import DenoisingEnv, EnvValue, Gather, Number, ParallelPlan, Region, Split


def _region(blocks: str, leave: str) -> Region:
    """Declares the region of one stack of blocks, up to the module whose output is gathered; branches split the batch.

    Every block is given the whole sequence's mask and rotary table again; its keys are whole, so the mask keeps its columns.
    """
    return Region(
        enter=Split(module=f"{blocks}.0", argument="x", rows=1, branches=0),
        follow=(
            Split(module=f"{blocks}.*", argument="attn_mask", branches=0),
            Split(module=f"{blocks}.*", argument="freqs_cis", rows=1, branches=0),
            # The modulation is computed for both rows of the pair, as the pipeline does, and one row is used.
            Split(module=f"{blocks}.*.adaLN_modulation", branches=0),
        ),
        leave=Gather(module=leave, rows=1, branches=0),
        attention=f"{blocks}.*.attention",
    )


class ZImage(Family):
    """The family of Tongyi-MAI/Z-Image and, as the variant "turbo", of Z-Image-Turbo."""

    name: ClassVar[str] = "z_image"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    variants: ClassVar[Mapping[str, Defaults]] = {
        "base": Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0, negative_prompt=""),
        "turbo": Defaults(height=1024, width=1024, num_inference_steps=9, guidance_scale=0.0, negative_prompt=""),
        "shapes": Defaults(height=64, width=64, num_inference_steps=8, guidance_scale=4.0, negative_prompt=""),
    }
    guidance_rule: ClassVar[str] = "cfg_pair"
    guided_above: ClassVar[Number] = 0
    noise_in: ClassVar[DtypeRule] = "float32"
    timesteps_in: ClassVar[DtypeRule] = "float32"
    conditioning: ClassVar[Conditioning] = Conditioning(
        latents=Argument(name="x", batch="list"),
        timestep="t",
        pair=("positive", "negative"),
        fields=(
            ConditioningField(
                name="cap_feats",
                shape=(TOKENS, "text"),
                batch="list",
                # Captions whose padded lengths are the same have the same shapes from the first product on.
                padded_to=32,
                sglang_name="encoder_hidden_states",
                is_listed_by_sglang=True,
            ),
            TEXT_LENGTHS,
        ),
    )
    parallel_plan: ClassVar[ParallelPlan] = ParallelPlan(
        regions=(
            _region("noise_refiner", "noise_refiner.-1"),
            _region("layers", "all_final_layer.2-1").following(
                Split(module="all_final_layer.2-1.adaLN_modulation", branches=0)
            ),
        ),
        columns=tuple(
            f"{blocks}.*.{linear}"
            for blocks in ("noise_refiner", "context_refiner", "layers")
            for linear in (
                "attention.to_q",
                "attention.to_k",
                "attention.to_v",
                "attention.to_out.0",
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
                "adaLN_modulation.0",
            )
            if not (blocks == "context_refiner" and linear == "adaLN_modulation.0")
        ),
    )

    modulation: ClassVar[tuple[str, ...]] = (
        "noise_refiner.*.adaLN_modulation",
        "layers.*.adaLN_modulation",
        "all_final_layer.*.adaLN_modulation",
    )

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        text_positions, rows, columns = config.axes_lens
        # Captions take positions 1..512, the image the one after them.
        needed = self.max_text_tokens + 2
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
            widths={"text": config.cap_feat_dim},
            max_tokens_per_side=(rows, columns),
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        rows, columns = height // spec.pixel_unit, width // spec.pixel_unit
        shape = (spec.latent_channels, 2 * rows, 2 * columns)
        return Geometry(height=height, width=width, rows=rows, columns=columns, noise_shape=(1, *shape), latent_shape=shape)

    @override
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        return linspace_float32(num_steps)

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        return noise[0]

    @override
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        return (1000 - timesteps.to(dtype)) / 1000

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        most = self.max_text_tokens
        embeds, _ = pipeline.encode_prompt(
            prompt.text, device=encoder_device(pipeline), do_classifier_free_guidance=False, max_sequence_length=most
        )
        return {"cap_feats": embeds[0]}

    @override
    def model_latents(self, latents: Float[Tensor, " *latent"], env: DenoisingEnv) -> Float[Tensor, " *input"]:
        return latents.unsqueeze(1)

    @override
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        (pair,) = outputs
        branches = [output.float() for output in pair]
        return -self.guide(branches, one.guidance.scale).squeeze(1)

    @staticmethod
    def guide(branches: list[Float[Tensor, " *latent"]], scale: Number) -> Float[Tensor, " *latent"]:
        """Computes pos + scale (pos - neg) in float32, or returns the conditional branch if it is alone."""
        if len(branches) == 1:
            return branches[0]
        positive, negative = branches
        return positive + scale * (positive - negative)

    @override
    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        """Solves for the unconditional output, element by element, and tells whether the model's dtype can represent it.

        With the right conditional output such a number, or a neighboring one, gives the recorded bits everywhere. With a wrong
        one it does not, because a scale above 1 leaves gaps between the velocities that can be reached.
        """
        (pair,) = outputs
        positive, target, scale = pair[0].float(), -velocity.unsqueeze(1), one.guidance.scale
        if scale <= 1:
            return False
        solved = positive.double() - (target.double() - positive.double()) / scale
        guided = lambda negative: self.guide([positive, negative.float()], scale)  # noqa: E731
        return reached(guided, target, neighbors(solved.to(pair[0].dtype))) == 1

    @override
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        vae = pipeline.vae
        return latents[None].to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor  # type: ignore[no-any-return]
