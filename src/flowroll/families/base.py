"""What a model family has to say: the one place for a model's conventions.

A `Family` is stateless. The engine and replay call the same `velocity`, so the forward that is replayed cannot drift from
the one that was rolled out. Families use torch alone: pipelines, VAEs and transformers reach them as objects that they
call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.families.conditioning import LENGTHS, Conditioning, ForwardInput, Output, uncollate
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.sampling.schedule import ScheduleConfig
from flowroll.types import DenoisingEnv, EnvValue, Number, ParallelPlan

# Any callable with the diffusers class's call signature: the plain module, FSDP-wrapped, with LoRA.
Transformer: TypeAlias = Callable[..., Any]

NO_GUIDANCE = "none"
DtypeRule: TypeAlias = Literal["model", "float32"]
# Where the pipelines cut a prompt by default.
MAX_TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the conditional and the unconditional branch become one velocity.

    Attributes:
        rule: "none" (the conditional branch alone), or the family's rule.
        scale: The guidance scale.
        embedded: The scale that the model is given as an input; None: it takes none.
    """

    rule: str
    scale: Number
    embedded: Number | None = None

    @property
    def is_active(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.rule != NO_GUIDANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What one sample's next velocity is a function of, beside the model.

    Attributes:
        latents: x at sigma, any float dtype.
        timestep: This step's entry of `model_timesteps`.
        env: The sample's environment, on the transformer's device.
        guidance: How the branches are combined.
        fixed: `Conditioning.fixed_inputs` of the environment, where they were made already.
    """

    latents: Float[Tensor, " *latent"]
    timestep: Float[Tensor, " 1"]
    env: DenoisingEnv
    guidance: Guidance
    fixed: Sequence[ForwardInput] | None = None


def run_in_turn(transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
    """The outputs of several forwards, one after the other."""
    return [transformer(**one, return_dict=False)[0] for one in forward_inputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the text encoders are given for one branch."""

    text: str


def reached(guide: Callable[[Tensor], Tensor], target: Tensor, candidates: Iterable[Tensor]) -> float:
    """The share of these numbers that are the guided velocity of some candidate for the unconditional output."""
    found = torch.zeros_like(target, dtype=torch.bool)
    for candidate in candidates:
        found |= guide(candidate) == target
    return found.sum().item() / found.numel()


def neighbors(solved: Tensor, count: int = 2) -> Iterator[Tensor]:
    """A tensor, and so many numbers of its dtype on either side of each of its own."""
    below = above = solved
    yield solved
    for _ in range(count):
        below = torch.nextafter(below, torch.full_like(below, -torch.inf))
        above = torch.nextafter(above, torch.full_like(above, torch.inf))
        yield from (below, above)


class Family(ABC):
    """A model family's conventions. What it declares is data; what is particular to it are about nine methods.

    Attributes:
        name: Name of the family, as in `SamplingRecord.family`.
        pipeline_class: The `_class_name` in model_index.json.
        text_encoders: Components of the pipeline that encode text; the first one is always there.
        tokenizers: Components of the pipeline that make tokens.
        optional_components: Those of both that a checkpoint may be saved without.
        variants: Defaults by variant; the first is what a checkpoint is taken for.
        guidance_rule: Name of the rule that `velocity` applies when guidance is active.
        guided_above: The pipeline runs the unconditional branch above this scale.
        noise_in: The dtype that the pipeline draws initial noise in: the model's, or float32.
        timesteps_in: The dtype in which the pipeline computes the timestep given to the model.
        max_text_tokens: How many tokens a text embedding has at most.
        conditioning: The arguments of a forward.
        parallel_plan: What of the transformer can be sharded.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    optional_components: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[Mapping[str, Defaults]]
    guidance_rule: ClassVar[str]
    guided_above: ClassVar[Number]
    noise_in: ClassVar[DtypeRule] = "model"
    timesteps_in: ClassVar[DtypeRule] = "model"
    max_text_tokens: ClassVar[int] = MAX_TEXT_TOKENS
    conditioning: ClassVar[Conditioning]
    parallel_plan: ClassVar[ParallelPlan]

    @abstractmethod
    def spec(self, pipeline: Any) -> ModelSpec:
        """The facts of a loaded diffusers pipeline.

        Raises:
            UnsupportedModelError: The checkpoint is of a kind that the family does not cover.
        """

    @abstractmethod
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        """The shapes of one sample; height and width are multiples of `spec.pixel_unit`."""

    @abstractmethod
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        """The grid before the shift, as the family's pipeline makes it."""

    @abstractmethod
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        """The first latents of one sample from the pipeline's noise."""

    @abstractmethod
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        """The schedule's timesteps as the model takes them.

        Args:
            timesteps: As the schedule has them, on the transformer's device.
            dtype: From `timestep_dtype`; the latents' dtype does not matter.
        """

    @abstractmethod
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        """The conditioning fields of one prompt, encoded alone as the pipeline encodes one prompt."""

    def size_arguments(self, geometry: Geometry, num_tokens: int) -> Mapping[str, EnvValue]:
        """The conditioning fields that follow from the image's size and the number of text tokens; none by default."""
        return {}

    def model_latents(self, latents: Float[Tensor, " *latent"], env: DenoisingEnv) -> Float[Tensor, " *input"]:
        """What the transformer takes for one sample's latents, without batch dimension; the latents by default."""
        return latents

    @abstractmethod
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        """The guided velocity of a sample from the outputs of its step's forwards."""

    @abstractmethod
    def decode(
        self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry
    ) -> Float[Tensor, " 1 3 height width"]:
        """What the VAE makes of one sample's latents, decoded alone; `picture` makes an image of it."""

    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        """Whether some other unconditional branch would make this velocity of the conditional branch in `outputs`.

        An audit asks this of a recorded velocity that replay does not reproduce: if so, weights, latents and the prompt are
        right, and the negative prompt is not. A family that cannot tell says no.

        Args:
            outputs: Of the forwards of a guided step, replayed.
            velocity: The recorded velocity, float32.
            one: The step, with the recorded guidance, which is active.
        """
        return False

    # What follows from the declaration.

    @property
    def embeds_key(self) -> str:
        """Name of the text embedding in the branches of a `DenoisingEnv`."""
        return self.conditioning.embeds.name

    def uses_cfg(self, scale: Number) -> bool:
        """Whether the pipeline runs the unconditional branch at this scale."""
        return scale > self.guided_above

    def guidance(self, scale: Number, embedded: Number | None = None) -> Guidance:
        """The guidance of this scale: active where the family's pipeline runs classifier-free guidance."""
        return Guidance(rule=self.guidance_rule if self.uses_cfg(scale) else NO_GUIDANCE, scale=scale, embedded=embedded)

    def size_fields(self, geometry: Geometry, num_tokens: int) -> dict[str, EnvValue]:
        """`size_arguments`, and the number of tokens where the family declares it."""
        declared = {field.name for field in self.conditioning.fields}
        lengths: dict[str, EnvValue] = {LENGTHS: [num_tokens]} if LENGTHS in declared else {}
        return {**self.size_arguments(geometry, num_tokens), **lengths}

    def noise_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that the pipeline draws initial noise in."""
        return model_dtype if self.noise_in == "model" else torch.float32

    def timestep_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the pipeline computes the timestep given to the model."""
        return model_dtype if self.timesteps_in == "model" else torch.float32

    def env(
        self,
        positive: Mapping[str, EnvValue],
        negative: Mapping[str, EnvValue] | None,
        geometry: Geometry,
        *,
        images: Mapping[str, EnvValue] | None = None,
        embedded: Number | None = None,
    ) -> DenoisingEnv:
        """The environment of one sample.

        Args:
            positive: The encoded prompt.
            negative: The encoded negative prompt; None without guidance.
            geometry: The shapes of the sample.
            images: The fields of reference images.
            embedded: The guidance scale that the model is given as an input.
        """

        def branch(text: Mapping[str, EnvValue]) -> dict[str, EnvValue]:
            embeds = cast(Tensor, text[self.embeds_key])
            return {**text, **self.size_fields(geometry, embeds.shape[0])}

        device = cast(Tensor, positive[self.embeds_key]).device
        env = DenoisingEnv(
            image_kwargs=images or {},
            pos_cond_kwargs=branch(positive),
            neg_cond_kwargs=None if negative is None else branch(negative),
            guidance=None if embedded is None else torch.tensor(embedded, dtype=torch.float32),
        )
        return env.with_tensors(lambda tensor: tensor.to(device))

    def forward_inputs(self, one: StepInput, dtype: torch.dtype) -> list[ForwardInput]:
        """The inputs of the transformer's forwards in one step of one sample; `dtype` is the transformer's."""
        latents, is_guided = self.model_latents(one.latents.to(dtype), one.env), one.guidance.is_active
        fixed = one.fixed or self.conditioning.fixed_inputs(one.env, is_guided=is_guided)
        return self.conditioning.forward_inputs(latents, one.timestep, fixed, is_guided=is_guided)

    def velocity(self, transformer: Transformer, one: StepInput, dtype: torch.dtype) -> Float[Tensor, " *latent"]:
        """The guided velocity v = eps - x0 of one sample.

        Args:
            transformer: The model, or a wrapper with its call signature.
            one: The sample's latents, timestep, environment and guidance.
            dtype: The transformer's dtype, to which its inputs are cast.

        Returns:
            The velocity, in the dtype that the pipeline gives to its scheduler.
        """
        return self.apply_guidance(run_in_turn(transformer, self.forward_inputs(one, dtype)), one)

    def collate_key(self, forward_input: ForwardInput) -> Hashable:
        """Forward inputs with equal keys can be collated: every tensor that the model makes of them has the same shape."""
        return self.conditioning.key(forward_input)

    def collate(self, forward_inputs: Sequence[ForwardInput]) -> ForwardInput:
        """One forward input for several of the same key, with the samples in this order."""
        return self.conditioning.collate(forward_inputs)

    def uncollate(self, output: Output, num_inputs: int) -> list[Output]:
        """The output of each forward input that was collated."""
        return uncollate(output, num_inputs)

    def rows_per_sample(self, forward_input: ForwardInput) -> int:
        """How many entries of the transformer's batch this forward input has: 2 where a sample's own forward is a pair."""
        return self.conditioning.rows(forward_input)

    @staticmethod
    def picture(pipeline: Any, decoded: Float[Tensor, " 1 3 height width"]) -> Float[Tensor, " 3 1 height width"]:
        """What the pipeline's image processor makes of a decoded batch of one, in the layout of a `Rollout`."""
        pixels = cast(Tensor, pipeline.image_processor.postprocess(decoded, output_type="pt"))
        return pixels[0].unsqueeze(1).to(torch.float32)
