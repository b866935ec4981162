"""The model family: the one place for the conventions of a model.

A `Family` is stateless. The engine and replay call the same `velocity`, so the forward that is replayed cannot drift from
the one that was rolled out. Families use torch alone: pipelines, VAEs and transformers reach them as objects that they
call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import UnsupportedModelError
from flowroll.families.conditioning import LENGTHS, Conditioning, ForwardInput, Output, uncollate
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.sampling.schedule import ScheduleConfig
from flowroll.types import DenoisingEnv, EnvValue, Number, ParallelPlan, ReferenceImage

# Any callable with the diffusers class's call signature: the plain module, FSDP-wrapped, with LoRA.
Transformer: TypeAlias = Callable[..., Any]

NO_GUIDANCE = "none"
DtypeRule: TypeAlias = Literal["model", "float32"]
# The number of tokens at which the pipelines cut a prompt by default.
MAX_TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the conditional and the unconditional branch are combined into one velocity.

    Attributes:
        rule: "none" (the conditional branch alone), or the family's rule.
        scale: The guidance scale.
        embedded: The scale that the model gets as an input; None if the model takes none.
    """

    rule: str
    scale: Number
    embedded: Number | None = None

    @property
    def is_active(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.rule != NO_GUIDANCE

    def given_in(self, env: DenoisingEnv, made_for: Guidance) -> DenoisingEnv:
        """Returns an environment that was made for another guidance, with this scale where the model gets one."""
        if self.embedded == made_for.embedded or env.guidance is None:
            return env
        assert self.embedded is not None
        return replace(env, guidance=torch.full_like(env.guidance, self.embedded))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """The inputs of one sample's next velocity, apart from the model.

    Attributes:
        latents: x at sigma, any float dtype.
        timestep: The entry of `model_timesteps` for this step.
        env: The sample's environment, on the transformer's device.
        guidance: How the branches are combined.
        is_first: Whether this is the first step of its sample.
        fixed: `Family.fixed_inputs` of the environment, where they were made already.
        geometry: The geometry from which the environment's size fields were made; None: they came from elsewhere.
        number: The timestep of the schedule that `timestep` is made of, as a number of the host; None: it is not known.
    """

    latents: Float[Tensor, " *latent"]
    timestep: Float[Tensor, " 1"]
    env: DenoisingEnv
    guidance: Guidance
    is_first: bool
    fixed: Sequence[ForwardInput] | None = None
    geometry: Geometry | None = None
    number: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the encoders get for one branch.

    Attributes:
        text: The text.
        max_tokens: The number of tokens at which it is cut, where the variant has its own; None: the family's.
        images: The reference images beside it, as RGB images of Pillow.
    """

    text: str
    max_tokens: int | None = None
    images: tuple[Any, ...] = ()


def encoder_device(pipeline: Any) -> torch.device:
    """Returns the device of a pipeline's text encoder. A pipeline that is not told it looks through all of its modules."""
    return cast(torch.device, pipeline.text_encoder.device)


class Family(ABC):
    """The conventions of a model family. It declares data, and defines about nine methods of its own.

    Attributes:
        name: The name of the family, as in `SamplingRecord.family`.
        pipeline_classes: Each `_class_name` in model_index.json that it covers.
        text_encoders: The pipeline's components that encode text; the first one is always present.
        tokenizers: The pipeline's components that make tokens.
        optional_components: The text encoders and tokenizers that a checkpoint may lack.
        variants: The defaults of each variant; `variants_of` says which of them a checkpoint may be used as.
        guidance_rule: The name of the rule that `velocity` applies when guidance is active.
        guided_above: The guidance scale above which the pipeline runs the unconditional branch.
        noise_in: The dtype in which the pipeline draws initial noise: the model's, or float32.
        timesteps_in: The dtype in which the pipeline computes the timestep given to the model.
        max_text_tokens: The largest number of tokens in a text embedding.
        shares_forwards: Whether several samples can go through the model in one forward.
        conditioning: The declaration of a forward's arguments.
        parallel_plan: The parts of the transformer that can be sharded.
        modulation: The paths of layers whose input is made of the timestep and of nothing else, with wildcards. Each is called
            once in a forward.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    optional_components: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[Mapping[str, Defaults]]
    guidance_rule: ClassVar[str]
    guided_above: ClassVar[Number]
    noise_in: ClassVar[DtypeRule] = "model"
    timesteps_in: ClassVar[DtypeRule] = "model"
    max_text_tokens: ClassVar[int] = MAX_TEXT_TOKENS
    shares_forwards: ClassVar[bool] = True
    conditioning: ClassVar[Conditioning]
    parallel_plan: ClassVar[ParallelPlan]
    modulation: ClassVar[tuple[str, ...]] = ()

    def variants_of(self, index: Mapping[str, object]) -> Sequence[str]:
        """Returns the variants that a checkpoint may be used as, by its model_index.json; by default all of them.

        A checkpoint is taken for the first one unless another is chosen.
        """
        return list(self.variants)

    @abstractmethod
    def spec(self, pipeline: Any) -> ModelSpec:
        """Returns the facts of a loaded diffusers pipeline.

        Raises:
            UnsupportedModelError: The family does not cover this kind of checkpoint.
        """

    @abstractmethod
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        """Returns the shapes of one sample; height and width are multiples of `spec.pixel_unit`."""

    def beside(self, geometry: Geometry, spec: ModelSpec, images: Sequence[ReferenceImage]) -> Geometry:
        """Returns the shapes of a sample beside these reference images; a family that takes images overrides it.

        Raises:
            InvalidRequestError: An image is too long for its width, or too wide for its height.
        """
        assert not images
        return geometry

    def image_tokens(self, spec: ModelSpec, images: Sequence[ReferenceImage]) -> tuple[int, ...]:
        """Returns how many tokens of a prompt stand for each of these reference images."""
        return ()

    def size_beside(self, spec: ModelSpec, images: Sequence[ReferenceImage]) -> tuple[int, int] | None:
        """Returns the height and width of a sample where a request with these images leaves them open; None: the defaults."""
        return None

    @abstractmethod
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        """Returns the grid before the shift, as the family's pipeline makes it."""

    def shift_exponent(self, config: ScheduleConfig, geometry: Geometry, num_steps: int) -> float:
        """Returns the exponent mu of a dynamic shift; by default it is linear in the number of image tokens."""
        return config.mu(geometry.num_tokens)

    @abstractmethod
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        """Makes the first latents of one sample from the pipeline's noise."""

    @abstractmethod
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        """Converts the schedule's timesteps to those that the model takes.

        Args:
            timesteps: The schedule's timesteps, on the transformer's device.
            dtype: The dtype from `timestep_dtype`; the latents' dtype does not matter.
        """

    @abstractmethod
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        """Encodes one prompt alone, as the pipeline does, and returns its conditioning fields."""

    def encode_images(self, pipeline: Any, images: Sequence[Any]) -> Mapping[str, EnvValue]:
        """Encodes reference images as the pipeline does, and returns the fields of `image_kwargs`.

        Args:
            pipeline: The loaded diffusers pipeline.
            images: RGB images of Pillow.
        """
        return {}

    def size_arguments(self, geometry: Geometry, num_tokens: int) -> Mapping[str, EnvValue]:
        """Returns the conditioning fields that follow from the images' sizes and the number of text tokens.

        By default these are the position ids of a family that declares a `RotaryTable`. Tensors of floats may have any dtype:
        `size_fields` converts them as the family declares.
        """
        table = self.conditioning.table
        return {} if table is None else table.position_ids(num_tokens, geometry.rows, geometry.columns)

    def model_latents(self, latents: Float[Tensor, " *latent"], env: DenoisingEnv) -> Float[Tensor, " *input"]:
        """Returns the transformer's input for one sample's latents, without batch dimension; by default the latents."""
        return latents

    @abstractmethod
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        """Computes a sample's guided velocity from the outputs of its step's forwards."""

    @abstractmethod
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        """Returns what the VAE decodes of one sample, as the pipeline makes it of the sample's latents."""

    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        """Tells whether another unconditional branch would give this velocity with the conditional branch in `outputs`.

        An audit asks this about a recorded velocity that replay does not reproduce. If the answer is yes, then weights, latents
        and prompt are right and the negative prompt is wrong. A family that cannot tell answers no.

        Args:
            outputs: The outputs of the forwards of a guided step, replayed.
            velocity: The recorded velocity, float32.
            one: The input of the step, with the recorded guidance, which is active.
        """
        return False

    # The methods below follow from the declaration.

    @property
    def embeds_key(self) -> str:
        """The name of the text embedding in the branches of a `DenoisingEnv`."""
        return self.conditioning.embeds.name

    def uses_cfg(self, scale: Number) -> bool:
        """Tells whether the pipeline runs the unconditional branch at this scale."""
        return scale > self.guided_above

    def guidance(self, scale: Number, embedded: Number | None = None) -> Guidance:
        """Returns the guidance of this scale, which is active where the family's pipeline runs classifier-free guidance."""
        return Guidance(rule=self.guidance_rule if self.uses_cfg(scale) else NO_GUIDANCE, scale=scale, embedded=embedded)

    def check_options(self, wanted: Iterable[tuple[str, object, object]], remedy: str) -> None:
        """Refuses a transformer whose configuration has other values than the family's forwards are written for.

        Args:
            wanted: The name of each option, its value, and the value that it must have.
            remedy: What to do.

        Raises:
            UnsupportedModelError: An option has another value.
        """
        for option, value, needed in wanted:
            if value != needed:
                raise UnsupportedModelError(
                    f"transformer option {option} must be {needed} for {self.name}, got {value}; {remedy}."
                )

    def guidances(
        self, guidance: Guidance, scales: Sequence[Number] | None, num_steps: int, *, has_negative: bool
    ) -> tuple[Guidance, ...]:
        """Returns the guidance of each step: the given one, or with a scale of its own.

        Args:
            guidance: The guidance of the request.
            scales: The scales, one per step: those that the model is given if it takes one, otherwise those of classifier-free
                guidance. None: all steps are alike.
            num_steps: The number of steps.
            has_negative: Whether there is an unconditional branch.
        """
        if scales is None:
            return (guidance,) * num_steps
        if guidance.embedded is not None:
            return tuple(replace(guidance, embedded=scale) for scale in scales)
        alone = Guidance(rule=NO_GUIDANCE, scale=guidance.scale)
        return tuple(self.guidance(scale) if has_negative else alone for scale in scales)

    def prompt(self, text: str, variant: str, images: Sequence[Any] = ()) -> Prompt:
        """Returns a text as the encoders get it for this variant; one that is not known cuts it as the family does.

        Args:
            text: The text.
            variant: The variant.
            images: The reference images beside it, as RGB images of Pillow.
        """
        known = self.variants.get(variant)
        return Prompt(text=text, max_tokens=None if known is None else known.max_text_tokens, images=tuple(images))

    def size_fields(self, geometry: Geometry, num_tokens: int, dtype: torch.dtype) -> dict[str, EnvValue]:
        """Returns `size_arguments` for a model of this dtype, and the number of text tokens if the family declares it."""
        declared = {field.name: field for field in self.conditioning.fields}
        lengths: dict[str, EnvValue] = {LENGTHS: [num_tokens]} if LENGTHS in declared else {}
        made = {
            name: value.to(dtype) if isinstance(value, Tensor) and declared[name].dtype == "model" else value
            for name, value in self.size_arguments(geometry, num_tokens).items()
        }
        return {**made, **lengths}

    def noise_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which the pipeline draws initial noise."""
        return model_dtype if self.noise_in == "model" else torch.float32

    def timestep_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which the pipeline computes the timestep given to the model."""
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
        """Makes the environment of one sample.

        Args:
            positive: The fields of the encoded prompt.
            negative: The fields of the encoded negative prompt; None without guidance.
            geometry: The shapes of the sample.
            images: The fields of reference images.
            embedded: The guidance scale that the model gets as an input.
        """

        def branch(text: Mapping[str, EnvValue]) -> dict[str, EnvValue]:
            embeds = cast(Tensor, text[self.embeds_key])
            return {**text, **self.size_fields(geometry, embeds.shape[0], embeds.dtype)}

        device = cast(Tensor, positive[self.embeds_key]).device
        env = DenoisingEnv(
            image_kwargs=images or {},
            pos_cond_kwargs=branch(positive),
            neg_cond_kwargs=None if negative is None else branch(negative),
            guidance=None if embedded is None else torch.tensor(embedded, dtype=torch.float32),
        )
        return env.with_tensors(lambda tensor: tensor.to(device))

    def fixed_inputs(self, env: DenoisingEnv, *, is_guided: bool) -> list[ForwardInput]:
        """Returns what the forwards of a step take beside latents and timestep, the same at every step of a request's samples.

        What a family keeps from one step to the next is in there too, so they belong to one set of weights.

        Args:
            env: The environment of the request.
            is_guided: Whether there is an unconditional branch.
        """
        return self.conditioning.fixed_inputs(env, is_guided=is_guided)

    def forward_inputs(self, one: StepInput, dtype: torch.dtype) -> list[ForwardInput]:
        """Returns the inputs of the transformer's forwards in one step of one sample; `dtype` is the transformer's."""
        latents, is_guided = self.model_latents(one.latents.to(dtype), one.env), one.guidance.is_active
        fixed = one.fixed or self.fixed_inputs(one.env, is_guided=is_guided)
        return self.conditioning.forward_inputs(latents, one.timestep, fixed, is_guided=is_guided)

    def velocity(self, transformer: Transformer, one: StepInput, dtype: torch.dtype) -> Float[Tensor, " *latent"]:
        """Computes the guided velocity v = eps - x0 of one sample.

        Args:
            transformer: The model, or a wrapper with its call signature.
            one: The sample's latents, timestep, environment and guidance.
            dtype: The transformer's dtype, to which its inputs are cast.

        Returns:
            The velocity, in the dtype that the pipeline gives to its scheduler.
        """
        return self.apply_guidance(self.run_in_turn(transformer, self.forward_inputs(one, dtype)), one)

    def run(self, transformer: Transformer, forward_input: ForwardInput) -> Output:
        """Runs one forward and returns its output."""
        output: Output = transformer(**forward_input, return_dict=False)[0]
        return output

    def run_in_turn(self, transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
        """Runs several forwards one after the other, and returns their outputs."""
        return [self.run(transformer, one) for one in forward_inputs]

    def collate_key(
        self, forward_input: ForwardInput, geometry: Geometry | None = None, *, any_length: bool = False
    ) -> Hashable:
        """Returns a key. Forward inputs with equal keys can be collated: all tensors inside the model have the same shapes.

        Args:
            forward_input: The arguments of a forward.
            geometry: The geometry from which its size fields were made; None: they may be anything.
            any_length: Whether inputs with texts of other lengths have equal keys, where texts may be padded. They can be
                collated after `pad_text`.
        """
        return self.conditioning.key(forward_input, geometry, any_length=any_length)

    def num_text_rows(self, forward_input: ForwardInput) -> int:
        """Returns the number of rows of a forward's text; 0 if the family does not let it be padded."""
        return self.conditioning.num_text_rows(forward_input)

    def pad_text(self, forward_input: ForwardInput, num_rows: int) -> ForwardInput:
        """Returns a forward input whose text has so many rows, the last of which are zeros that attention must not see."""
        return self.conditioning.pad_text(forward_input, num_rows)

    def collate(self, forward_inputs: Sequence[ForwardInput]) -> ForwardInput:
        """Joins several forward inputs of the same key into one, with the samples in this order."""
        return self.conditioning.collate(forward_inputs)

    def uncollate(self, output: Output, num_inputs: int) -> list[Output]:
        """Splits an output into one output per forward input that was collated."""
        return uncollate(output, num_inputs)

    def rows_per_sample(self, forward_input: ForwardInput) -> int:
        """Returns the number of entries that this forward input has in the transformer's batch: 2 for a pair of branches."""
        return self.conditioning.rows(forward_input)

    def decode(
        self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry
    ) -> Float[Tensor, " 1 colors height width"]:
        """Decodes one sample's latents alone with the VAE; `picture` makes an image of the result."""
        decoded: Tensor = pipeline.vae.decode(self.vae_input(pipeline, latents, geometry), return_dict=False)[0]
        return self.decoded_image(decoded)

    @staticmethod
    def decoded_image(decoded: Float[Tensor, " 1 colors *frames height width"]) -> Float[Tensor, " 1 colors height width"]:
        """Returns the image in what the VAE returned: the only frame of a VAE for videos."""
        return decoded[:, :, 0] if decoded.ndim == 5 else decoded

    @staticmethod
    def picture(pipeline: Any, decoded: Float[Tensor, " 1 colors height width"]) -> Float[Tensor, " colors 1 height width"]:
        """Converts a decoded batch of one as the pipeline's image processor does, to the layout of a `Rollout`."""
        pixels = cast(Tensor, pipeline.image_processor.postprocess(decoded, output_type="pt"))
        return pixels[0].unsqueeze(1).to(torch.float32)
