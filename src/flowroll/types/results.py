"""The results of requests: `Rollout`, its parts, and `GeneratedImage`. Tensors have no batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.sampling.base import StepRule
from flowroll.sampling.transition import GAUSSIAN, NO_CONST, LogProbForm
from flowroll.types.adapters import AdapterRecord
from flowroll.types.forks import Branch
from flowroll.types.groups import RolloutStack, Steps, at_steps, stack
from flowroll.types.images import ReferenceImage
from flowroll.types.params import ImageFormat, Number, SdeType
from flowroll.types.pictures import encode_png, pil_image
from flowroll.types.policies import PolicyRecord
from flowroll.types.provenance import Exactness, Provenance, StepStamp
from flowroll.types.shown import Shown, rollout_html, rollout_png, rollout_text, with_tensors

if TYPE_CHECKING:
    from PIL.Image import Image

# The value of one transformer argument in an environment: a tensor without batch dimension, or plain nested lists.
EnvValue: TypeAlias = "Tensor | int | float | str | bool | Sequence[EnvValue]"

SCHEMA_VERSION = 1


def is_readable_version(version: int) -> bool:
    """Tells whether this flowroll reads records and files of a schema version: its own and all earlier ones."""
    return 1 <= version <= SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRecord:
    """How a sample was made: everything that replay needs beside its tensors and the weights.

    Attributes:
        family: Name of the model family, e.g. "qwen_image".
        variant: Variant of the family, e.g. "base", "turbo".
        sde_type: Dynamics of the stochastic steps.
        noise_level: The user's knob n.
        log_prob_no_const: Which of the two log-prob conventions was used, unless `log_prob` says another form.
        guidance_rule: How the branches were combined: "none", or the family's rule.
        guidance_scale: The effective scale; meaningless for rule "none". The largest one where each step has its own.
        guidance_scales: The scale of each step, where the request gave one for each; of a model that takes the scale as an
            input, these are what it was given, and `embedded_guidance_scale` is the first.
        negative_prompt: Text of the unconditional branch; None without guidance, and beside token ids or embeddings.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        num_inference_steps: Number of transitions T.
        sigmas: T + 1 noise levels, float32 values.
        timesteps: T timesteps as the model's schedule has them, float32 values.
        generator_device: Device type that the noise was drawn on.
        model_dtype: Dtype of the transformer's inputs, e.g. "torch.bfloat16".
        timestep_dtype: Dtype in which the timestep given to the model was computed.
        device: Device type that the transformer ran on.
        schema_version: Version of this record.
        pos_cond_sha256: `branch_digest` of the environment's conditional branch; None for plain generation, and in older
            records of samples whose environment was not returned.
        neg_cond_sha256: `branch_digest` of the unconditional branch; None without one.
        steps: The dynamics and noise level of each step, where they were given for each; `sde_type` and `noise_level` are then
            only what the request left them at. None: all chosen steps follow `sde_type`.
        lora: The adapter with which the sample was made; None: the model without an adapter.
        policy: The policy with which the sample was made; None: the default.
        embedded_guidance_scale: The guidance scale that the model was given, beside `guidance_scale`; None: it takes none.
        rope_axes: Widths of the axes of the model's rotary embedding, with which the sglang dialect makes a table of position
            ids; None for a family whose forwards take no ids.
        init_seed: The seed of the initial noise; None where none was drawn, and in records from before this field.
        sde_seed: The seed of the noise of the stochastic steps; None for plain generation, and in records from before this
            field.
        start_step: The first step that was run. Per-step values of a rollout have a row for each of the T steps all the same.
        stop_step: The step before which the run ended; None: T.
        branches: The node of a leaf of a tree at each level, from the first fork to the last one; before the first fork the
            noise is of `sde_seed`, then of the seeds of these. None: the request had no fork.
        latents_sha256: `branch_digest` of {"latents": the state that the sample was started from}, where the request gave it;
            None: initial noise was drawn.
        log_prob: The form of the log-probs, where the request gave one; None: as `log_prob_no_const` says.
        prompt_token_ids: The token ids of the conditional branch, where the request gave these.
        negative_prompt_token_ids: Those of the unconditional branch, where they were used.
        prompt_embeds_sha256: `branch_digest` of the conditional branch's fields that are made of a prompt, where the request
            gave these as `prompt_embeds`.
        negative_prompt_embeds_sha256: That of the unconditional branch, where `negative_prompt_embeds` were used.
        images: The reference images of the request, which both branches have; None where there were none.
        image_format: The form of the picture; "none": there is none, and the final latents are returned.
    """

    family: str
    variant: str
    sde_type: SdeType
    noise_level: Number
    log_prob_no_const: bool
    guidance_rule: str
    guidance_scale: Number
    negative_prompt: str | None
    height: int
    width: int
    num_inference_steps: int
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    generator_device: str
    model_dtype: str
    timestep_dtype: str
    device: str
    schema_version: int = SCHEMA_VERSION
    # These fields were added later, and do not affect the steps of a record without them, which has the same schema version.
    pos_cond_sha256: str | None = None
    neg_cond_sha256: str | None = None
    lora: AdapterRecord | None = None
    policy: PolicyRecord | None = None
    embedded_guidance_scale: Number | None = None
    guidance_scales: tuple[Number, ...] | None = None
    rope_axes: tuple[int, ...] | None = None
    steps: tuple[StepRule, ...] | None = None
    init_seed: int | None = None
    sde_seed: int | None = None
    start_step: int = 0
    stop_step: int | None = None
    branches: tuple[Branch, ...] | None = None
    latents_sha256: str | None = None
    log_prob: LogProbForm | None = None
    image_format: ImageFormat = "tensor"
    prompt_token_ids: tuple[tuple[int, ...], ...] | None = None
    negative_prompt_token_ids: tuple[tuple[int, ...], ...] | None = None
    prompt_embeds_sha256: str | None = None
    negative_prompt_embeds_sha256: str | None = None
    images: tuple[ReferenceImage, ...] | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.start_step < self.steps_run.stop <= self.num_inference_steps
        assert self.steps is None or len(self.steps) == self.num_inference_steps
        assert len(self.sigmas) == self.num_inference_steps + 1
        assert len(self.timesteps) == self.num_inference_steps
        assert self.guidance_scales is None or len(self.guidance_scales) == self.num_inference_steps

    @property
    def steps_run(self) -> range:
        """The steps that were run, counted from the beginning of the grid."""
        return range(self.start_step, self.num_inference_steps if self.stop_step is None else self.stop_step)

    @property
    def log_prob_form(self) -> LogProbForm:
        """What counted as the log-prob of a step."""
        return self.log_prob or (NO_CONST if self.log_prob_no_const else GAUSSIAN)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Trajectory(Shown):
    """The latents a sample went through.

    Attributes:
        latents: x before each kept step, then the final latents; in the loop's dtype, float32 where steps differ.
        latent_step_indices: The state (0..T) of each row of `latents`.
        timesteps: The timesteps of the model's schedule, float32.
        sigmas: The noise levels, float32; 1 is noise.
    """

    latents: Float[Tensor, " kept *latent"]
    latent_step_indices: tuple[int, ...]
    timesteps: Float[Tensor, " steps"]
    sigmas: Float[Tensor, " states"]

    def __post_init__(self) -> None:
        assert self.latents.shape[0] == len(self.latent_step_indices)
        assert self.sigmas.shape[0] == self.timesteps.shape[0] + 1


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DebugTensors(Shown):
    """What every transition saw and made; float32. At a deterministic step noise and std are zeros.

    Attributes:
        variance_noise: The standard normal noise of each step.
        prev_sample_mean: Mean of the next latents (the next latents themselves at a deterministic step).
        noise_std_dev: Total std of the transition.
        model_output: The guided velocity given to the transition, v = eps - x0.
    """

    variance_noise: Float[Tensor, " steps *latent"]
    prev_sample_mean: Float[Tensor, " steps *latent"]
    noise_std_dev: Float[Tensor, " steps 1"]
    model_output: Float[Tensor, " steps *latent"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StepTensors(Shown):
    """The fields of single steps that a request chose.

    Attributes:
        step_indices: The step of each row, ascending.
        tensors: The tensors by field, in float32: "x0", the clean prediction x - s v; "velocity", guided, v = eps - x0; "mean",
            of the next latents; "noise", standard normal, zeros at a deterministic step; [rows, latent] each; and "std",
            [rows, 1].
    """

    step_indices: tuple[int, ...]
    tensors: Mapping[str, Float[Tensor, " rows *_"]]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StepImages(Shown):
    """The clean predictions of single steps as pictures.

    Attributes:
        step_indices: The step of each picture, ascending.
        images: The pictures, in the form of the sample's own.
    """

    step_indices: tuple[int, ...]
    images: tuple[Tensor | bytes, ...]


def replace_tensors(value: Any, change: Callable[[Tensor], object]) -> Any:
    """Returns the same nested mappings and lists with every tensor replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: replace_tensors(item, change) for key, item in value.items()}
    return [replace_tensors(item, change) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DenoisingEnv(Shown):
    """Every argument of the transformer that does not change along the trajectory, for one sample.

    A family declares which arguments there are (`Family.conditioning`). Tensors have no batch dimension.

    Attributes:
        image_kwargs: What comes from reference images, for both branches; empty for text-to-image.
        pos_cond_kwargs: Arguments of the conditional branch.
        neg_cond_kwargs: Arguments of the unconditional branch; None without guidance.
        guidance: Guidance embedding input; None for models without one.
    """

    image_kwargs: Mapping[str, EnvValue] = field(default_factory=dict)
    pos_cond_kwargs: Mapping[str, EnvValue]
    neg_cond_kwargs: Mapping[str, EnvValue] | None
    guidance: Tensor | None = None

    def to(self, device: torch.device | str) -> DenoisingEnv:
        """Returns a copy of the environment on a device; it shares no memory with this one."""
        return self.with_tensors(lambda tensor: tensor.detach().to(device, copy=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> DenoisingEnv:
        """Returns the environment with every tensor replaced, at any depth."""
        return DenoisingEnv(**replace_tensors({name: getattr(self, name) for name in self.__slots__}, change))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor with its dotted name, e.g. "pos_cond_kwargs.cap_feats", in a fixed order."""

        def found(name: str, value: EnvValue) -> Iterator[tuple[str, Tensor]]:
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, list | tuple):
                for index, item in enumerate(value):
                    yield from found(f"{name}[{index}]", item)

        for part in ("image_kwargs", "pos_cond_kwargs", "neg_cond_kwargs"):
            for key, value in (getattr(self, part) or {}).items():
                yield from found(f"{part}.{key}", value)
        if self.guidance is not None:
            yield "guidance", self.guidance


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Rollout:
    """One finished sample.

    It prints in a few lines, and a notebook shows its picture. `rollout[2:5]` has the tensors of these steps alone.

    Attributes:
        request_id: Id of the request to which the sample belongs.
        prompt: The prompt's text; None where the request gave none, but its token ids or embeddings.
        seed: This sample's own seed; that of the sample that it descends from, for a leaf of a tree.
        image: The picture in the form that the record names: float32 in [0, 1], its eight bits (uint8, the same shape), the
            bytes of a PNG file, or None.
        latents: Final latents in the loop's dtype, where nothing was decoded; None otherwise.
        log_probs: The log-prob of each step, float32; 0.0 at deterministic steps. None for an evaluation.
        sde_step_indices: The steps that have a density, ascending. None for an evaluation.
        debug_tensors: What every transition saw and made; None unless requested.
        denoising_env: The environment of the sample; None unless requested.
        dit_trajectory: The latents of the steps; None unless requested.
        step_tensors: The chosen fields of the chosen steps; None unless requested.
        step_images: The pictures of chosen steps' clean predictions; None unless requested.
        weight_version: Version of the weights that made the sample.
        sampling: The record of how the sample was made.
        inference_time_s: Wall time of this sample's denoising loop and decode, seconds.
        peak_memory_mb: Peak memory of the engine's process so far (on CUDA: of this request), MiB.
        provenance: What proves where it comes from; None in files from before this field.
        first_step: When its first step was taken, and by which weights; that of the sample that it descends from, for a leaf of
            a tree. None in files from before this field, and so is the next.
        last_step: When its last step was taken, and by which weights.
        left_out: The places of the request's samples, in the order of the seeds, that an abort with `keep_partial` left out of
            the answer; empty for a whole answer.
    """

    request_id: str
    prompt: str | None
    seed: int
    image: Float[Tensor, " colors frames height width"] | UInt8[Tensor, " colors frames height width"] | bytes | None
    latents: Float[Tensor, " *latent"] | None = None
    log_probs: Float[Tensor, " steps"] | None = None
    sde_step_indices: tuple[int, ...] | None = None
    debug_tensors: DebugTensors | None = None
    denoising_env: DenoisingEnv | None = None
    dit_trajectory: Trajectory | None = None
    step_tensors: StepTensors | None = None
    step_images: StepImages | None = None
    weight_version: str
    sampling: SamplingRecord
    inference_time_s: Number
    peak_memory_mb: Number
    provenance: Provenance | None = None
    first_step: StepStamp | None = None
    last_step: StepStamp | None = None
    left_out: tuple[int, ...] = ()

    # Or `__getitem__` would make a sequence of it, which ends at an error.
    __iter__ = None

    def __repr__(self) -> str:
        return rollout_text(self)

    def _repr_html_(self) -> str:
        return rollout_html(self)

    def _repr_png_(self) -> bytes | None:
        return rollout_png(self)

    def __getitem__(self, steps: Steps) -> Rollout:
        """Returns the rollout with the tensors of some steps alone: `rollout[2:5]`, `rollout[3]` or `rollout[[0, 3]]`.

        The trajectory keeps the states from which these steps are replayed. The rows of `debug_tensors` go to `step_tensors`,
        which name their steps, beside those that are there already; where both were returned, of the steps that both have.
        The record, the log-probs and the indices stay those of the whole run, so that steps keep their numbers: replay the
        result with `steps=range(2, 5)`.

        Raises:
            InvalidRequestError: A step is out of range, or there is none.
        """
        return at_steps(self, steps)

    @staticmethod
    def stack(rollouts: Sequence[Rollout]) -> RolloutStack:
        """Stacks the tensors of a group.

        Raises:
            InvalidRequestError: There is no rollout, or they differ in their grid, their steps or a shape; the message says
                where.
        """
        return stack(rollouts)

    def to(self, device: torch.device | str) -> Rollout:
        """Returns the rollout with every tensor on a device; a tensor that is there already is shared."""
        return with_tensors(self, lambda tensor: tensor.to(device))

    def pil(self) -> Image:
        """Returns the picture as Pillow has pictures.

        Raises:
            InvalidRequestError: Nothing was decoded.
            MissingExtraError: Pillow is not installed.
        """
        return pil_image(_picture_of(self))

    def save(self, path: str | Path) -> None:
        """Writes the rollout to a safetensors file, which `flowroll.load_rollouts` reads; to a `.png` file the picture alone.

        Raises:
            InvalidRequestError: A picture is to be written, and nothing was decoded.
            RolloutFileError: The file cannot be written there.
        """
        from flowroll.wire.files import save_rollout, write_whole

        if Path(path).suffix.lower() == ".png":
            write_whole(Path(path), [encode_png(_picture_of(self))])
        else:
            save_rollout(path, self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GeneratedImage(Shown):
    """One picture of plain text-to-image generation.

    Attributes:
        request_id: Id of the request to which the sample belongs.
        prompt: The prompt's text; None where the request gave none, but its token ids or embeddings.
        seed: This sample's own seed.
        image: Decoded picture in [0, 1], float32.
        latents: Final latents in the loop's dtype, as the diffusers pipeline returns them for `output_type="latent"`.
        sampling: The record of how the sample was made.
        weight_version: Version of the weights that made the sample.
        inference_time_s: Wall time of this sample's denoising loop and decode, seconds.
        first_step: As of a `Rollout`, and so are the next two.
        last_step: When its last step was taken, and by which weights.
        left_out: The places of the request's samples that the answer lacks.
        exactness: "fast" for an engine in the mode that is not exact.
    """

    request_id: str
    prompt: str | None
    seed: int
    image: Float[Tensor, " colors frames height width"]
    latents: Float[Tensor, " *latent"]
    sampling: SamplingRecord
    weight_version: str
    inference_time_s: Number
    first_step: StepStamp | None = None
    last_step: StepStamp | None = None
    left_out: tuple[int, ...] = ()
    exactness: Exactness = "exact"

    def pil(self) -> Image:
        """Returns the picture as Pillow has pictures.

        Raises:
            MissingExtraError: Pillow is not installed.
        """
        return pil_image(self.image)

    def _repr_png_(self) -> bytes:
        return encode_png(self.image)


def _picture_of(rollout: Rollout) -> Tensor | bytes:
    if rollout.image is None:
        raise InvalidRequestError(
            "the rollout must have a picture, got latents alone; roll out with another image_format.", field="image"
        )
    return rollout.image
