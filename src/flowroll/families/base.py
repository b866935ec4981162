"""What a model family has to say: the one place for a model's conventions.

A `Family` is stateless. The engine and replay call the same `velocity`, so the forward that is replayed cannot drift from
the one that was rolled out. Families use torch alone: pipelines, VAEs and transformers reach them as objects that they
call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.families.batched import PerSample
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.types import DenoisingEnv, EnvValue, Number, ParallelPlan

# Any callable with the diffusers class's call signature: the plain module, FSDP-wrapped, with LoRA.
Transformer: TypeAlias = Callable[..., Any]
# The keyword arguments of one forward, and what a forward returns: a batch, or a list of samples.
Call: TypeAlias = Mapping[str, Any]
Output: TypeAlias = "Tensor | list[Tensor]"
# Runs the forwards of one step.
RunCalls: TypeAlias = Callable[[Transformer, Sequence[Call]], list[Output]]

NO_GUIDANCE = "none"
# Where the pipelines cut a prompt by default.
MAX_TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the conditional and the unconditional branch become one velocity.

    Attributes:
        rule: "none" (the conditional branch alone), or the family's rule.
        scale: The guidance scale.
    """

    rule: str
    scale: Number

    @property
    def is_active(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.rule != NO_GUIDANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One sample's next velocity: the arguments of `Family.velocity` that are its own.

    Attributes:
        latents: x at sigma, any float dtype.
        timestep: This step's entry of `model_timesteps`.
        env: The sample's environment, on the transformer's device.
        guidance: How the branches are combined.
    """

    latents: Float[Tensor, " *latent"]
    timestep: Float[Tensor, " 1"]
    env: DenoisingEnv
    guidance: Guidance


def run_in_turn(transformer: Transformer, calls: Sequence[Call]) -> list[Output]:
    """The outputs of all calls, one forward after the other."""
    return [transformer(**call, return_dict=False)[0] for call in calls]


class Family(ABC):
    """A model family's conventions.

    Attributes:
        name: Name of the family, as in `SamplingRecord.family`.
        pipeline_class: The `_class_name` in model_index.json.
        variants: Defaults by variant; the first is what a checkpoint is taken for.
        guidance_rule: Name of the rule that `velocity` applies when guidance is active.
        embeds_key: Key of the text embedding in the branches of a `DenoisingEnv`.
        env_schema: The other keys of a branch, each with its layout.
        env_required: Those of them that no forward can do without.
        parallel_plan: What of the transformer can be sharded.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    variants: ClassVar[Mapping[str, Defaults]]
    guidance_rule: ClassVar[str]
    embeds_key: ClassVar[str]
    env_schema: ClassVar[Mapping[str, str]]
    env_required: ClassVar[tuple[str, ...]] = ()
    parallel_plan: ClassVar[ParallelPlan]

    def guidance(self, scale: Number) -> Guidance:
        """The guidance of this scale: active where the family's pipeline runs classifier-free guidance."""
        return Guidance(rule=self.guidance_rule if self.guides(scale) else NO_GUIDANCE, scale=scale)

    @abstractmethod
    def guides(self, scale: Number) -> bool:
        """Whether the pipeline runs the unconditional branch at this scale."""

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
    def base_grid(self, num_steps: int) -> Float[Tensor, " steps"]:
        """The grid before the shift, as the family's pipeline makes it."""

    @abstractmethod
    def noise_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that the pipeline draws initial noise in."""

    @abstractmethod
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        """The first latents of one sample from the pipeline's noise."""

    @abstractmethod
    def timestep_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the pipeline computes the timestep given to the model."""

    @abstractmethod
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        """The schedule's timesteps as the model takes them.

        Args:
            timesteps: As the schedule has them, on the transformer's device.
            dtype: From `timestep_dtype`; the latents' dtype does not matter.
        """

    @abstractmethod
    def encode(self, pipeline: Any, prompt: str) -> Mapping[str, EnvValue]:
        """The text arguments of one prompt, encoded alone as the pipeline encodes one prompt."""

    def image_arguments(self, geometry: Geometry) -> Mapping[str, EnvValue]:
        """The transformer's arguments about the image's shape, the same in both branches; none by default."""
        return {}

    def env(
        self, positive: Mapping[str, EnvValue], negative: Mapping[str, EnvValue] | None, geometry: Geometry
    ) -> DenoisingEnv:
        """The environment of one sample from its encoded prompts."""

        def branch(text: Mapping[str, EnvValue]) -> dict[str, EnvValue]:
            length = cast(Tensor, text[self.embeds_key]).shape[0]
            return {**text, **self.image_arguments(geometry), "txt_seq_lens": [length]}

        return DenoisingEnv(pos_cond_kwargs=branch(positive), neg_cond_kwargs=None if negative is None else branch(negative))

    @abstractmethod
    def calls(
        self,
        latents: Float[Tensor, " *latent"],
        timestep: Float[Tensor, " 1"],
        env: DenoisingEnv,
        guidance: Guidance,
        dtype: torch.dtype,
    ) -> list[Call]:
        """The transformer calls of one step of one sample; the arguments are those of `velocity`."""

    @abstractmethod
    def combine(self, outputs: Sequence[Output], guidance: Guidance) -> Float[Tensor, " *latent"]:
        """The guided velocity from the outputs of `calls`."""

    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], guidance: Guidance) -> bool:
        """Whether some other unconditional branch would make this velocity of the conditional branch in `outputs`.

        An audit asks this of a recorded velocity that replay does not reproduce: if so, weights, latents and the prompt are
        right, and the negative prompt is not. A family that cannot tell says no.

        Args:
            outputs: Of the calls of a guided step, replayed.
            velocity: The recorded velocity, float32.
            guidance: The recorded guidance, active.
        """
        return False

    def velocity(
        self,
        transformer: Transformer,
        latents: Float[Tensor, " *latent"],
        timestep: Float[Tensor, " 1"],
        env: DenoisingEnv,
        guidance: Guidance,
        dtype: torch.dtype,
        *,
        run: RunCalls = run_in_turn,
    ) -> Float[Tensor, " *latent"]:
        """The guided velocity v = eps - x0 of one sample.

        Args:
            transformer: The model, or a wrapper with its call signature.
            latents: x at sigma, any float dtype.
            timestep: This step's entry of `model_timesteps`.
            env: The sample's environment, on the transformer's device.
            guidance: How the branches are combined.
            dtype: The transformer's dtype, to which its inputs are cast.
            run: Runs the step's forwards; one after the other by default.

        Returns:
            The velocity, in the dtype that the pipeline gives to its scheduler.
        """
        return self.combine(run(transformer, self.calls(latents, timestep, env, guidance, dtype)), guidance)

    def velocities(
        self, transformer: Transformer, inputs: Sequence[StepInput], dtype: torch.dtype, *, run: RunCalls = run_in_turn
    ) -> list[Tensor]:
        """The guided velocities of several samples, bit for bit what `velocity` gives for each.

        Forwards of the same `call_key` are run as one, whichever samples and branches they belong to. With another `run` than
        the default (ranks that share a forward) samples run in turn.

        Args:
            transformer: The model, or a wrapper with its call signature.
            inputs: Samples at any steps of any schedules.
            dtype: The transformer's dtype.
            run: Runs a step's forwards.

        Returns:
            The velocities in the order of the inputs.
        """
        if len(inputs) == 1 or run is not run_in_turn:
            return [
                self.velocity(transformer, one.latents, one.timestep, one.env, one.guidance, dtype, run=run) for one in inputs
            ]
        calls = [self.calls(one.latents, one.timestep, one.env, one.guidance, dtype) for one in inputs]
        owners = [index for index, own in enumerate(calls) for _ in own]
        timesteps = _first_of_same([one.timestep for one in inputs])
        outputs = iter(self._run_together(transformer, [call for own in calls for call in own], [timesteps[i] for i in owners]))
        return [self.combine([next(outputs) for _ in own], one.guidance) for own, one in zip(calls, inputs, strict=True)]

    def batch_key(self, one: StepInput) -> Hashable:
        """Samples with equal keys share all their forwards in `velocities`; it is the same at every step of a sample."""
        calls = self.calls(one.latents, one.timestep, one.env, one.guidance, one.latents.dtype)
        return tuple(self.call_key(call) for call in calls)

    def _run_together(self, transformer: Transformer, calls: Sequence[Call], timesteps: Sequence[int]) -> list[Output]:
        """The outputs of all calls; those of one key in one forward."""
        groups: dict[Hashable, list[int]] = {}
        for index, call in enumerate(calls):
            groups.setdefault(self.call_key(call), []).append(index)
        outputs: dict[int, Output] = {}
        for members in groups.values():
            if len(members) == 1:
                outputs[members[0]] = run_in_turn(transformer, [calls[members[0]]])[0]
                continue
            place = {timesteps[index]: position for position, index in reversed(list(enumerate(members)))}
            mode = PerSample([place[timesteps[index]] for index in members])
            batched = self.merge([calls[index] for index in members])
            output = mode.forward(transformer, batched, self.entries(calls[members[0]]))
            outputs.update(zip(members, self.split(output, len(members)), strict=True))
        return [outputs[index] for index in range(len(calls))]

    @abstractmethod
    def call_key(self, call: Call) -> Hashable:
        """Calls with equal keys have inputs of the same shapes, and can be merged."""

    @abstractmethod
    def merge(self, calls: Sequence[Call]) -> Call:
        """One call for several of the same key."""

    @abstractmethod
    def split(self, output: Output, num_calls: int) -> list[Output]:
        """The outputs of the merged calls."""

    @abstractmethod
    def entries(self, call: Call) -> int:
        """How many entries of a batch this call has."""

    @abstractmethod
    def decode(
        self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry
    ) -> Float[Tensor, " 1 3 height width"]:
        """What the VAE makes of one sample's latents, decoded alone; `picture` makes an image of it."""

    @staticmethod
    def picture(pipeline: Any, decoded: Float[Tensor, " 1 3 height width"]) -> Float[Tensor, " 3 1 height width"]:
        """What the pipeline's image processor makes of a decoded batch of one, in the layout of a `Rollout`."""
        pixels = cast(Tensor, pipeline.image_processor.postprocess(decoded, output_type="pt"))
        return pixels[0].unsqueeze(1).to(torch.float32)


def _first_of_same(timesteps: Sequence[Float[Tensor, " 1"]]) -> list[int]:
    """For each timestep the first that is the same; on a GPU only those in the same memory, since looking would wait for it."""
    keys = [one.item() if one.device.type == "cpu" else one.data_ptr() for one in timesteps]
    return [keys.index(key) for key in keys]
