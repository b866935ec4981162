"""Plans requests: decides everything that is known before any model work. Invalid requests are refused here at the latest."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.facts import ModelFacts
from flowroll.engine.images import check_images
from flowroll.engine.prompts import BranchText, check_token_ids, negative_text, with_checked_embeds
from flowroll.engine.starts import PlannedSample, check_forks, plan_samples, plan_steps, with_checked_latents
from flowroll.families import Geometry, Guidance
from flowroll.sampling.base import StepRule
from flowroll.sampling.dynamics import amplification, rules_of, transitions, transitions_of
from flowroll.sampling.schedule import Schedule, explicit_schedule, shifted_schedule
from flowroll.sampling.transition import ODE, Transition
from flowroll.types import ImageFormat, Number, ReferenceImage, SamplingParams, SamplingRecord
from flowroll.types.forks import Fork, count_leaves
from flowroll.types.params import TENSORS
from flowroll.types.rules import refuse

# Every norm in a model squares the latents; beyond about this value, the squares overflow float32.
_MAX_AMPLIFICATION = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """A checked request with every default filled in, which its samples share.

    Attributes:
        params: The parameters of the request; its tensors are copies on the CPU.
        request_id: The id of the request: the given one, or a new one.
        samples: The samples that are started; with a fork, each of them becomes several.
        steps: The steps that are run.
        prompt: The text of the conditional branch.
        negative_prompt: The text of the unconditional branch; None if no such branch runs.
        geometry: The shapes of a sample.
        schedule: The sigma grid.
        transitions: The transitions, one per step; None for plain generation, which takes plain ODE steps.
        guidance: How the conditional and the unconditional branch are combined in the step that needs the most.
        guidances: How they are combined in each step.
        generator_device: The device on which noise is drawn.
        record: The record of these choices, for the answer.
        held_policy: The policy whose weights must be in place while its samples run; None: those that the engine was last
            given. The engine sets it when it accepts the plan.
    """

    params: SamplingParams
    request_id: str
    samples: tuple[PlannedSample, ...]
    steps: range
    prompt: BranchText
    negative_prompt: BranchText | None
    geometry: Geometry
    schedule: Schedule
    transitions: tuple[Transition, ...] | None
    guidance: Guidance
    guidances: tuple[Guidance, ...]
    generator_device: torch.device
    record: SamplingRecord
    held_policy: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the samples."""
        return tuple(sample.seed for sample in self.samples)

    def part(self, samples: range) -> RequestPlan:
        """Returns the plan of these samples alone, whose answers are those that they have in the whole request.

        Args:
            samples: The places of the samples among those that are started.
        """
        leaves = count_leaves(self.forks)
        chosen = self.samples[samples.start : samples.stop]
        return replace(self, samples=tuple(replace(sample, index=place * leaves) for place, sample in enumerate(chosen)))

    @property
    def num_answers(self) -> int:
        """The number of entries of the answer: the leaves of all samples."""
        return len(self.samples) * count_leaves(self.forks)

    @property
    def forks(self) -> Fork:
        """The steps at which samples fork, with their numbers of children."""
        return cast(Fork, self.params.fork or ())

    @property
    def num_steps_taken(self) -> int:
        """The number of steps that all samples take together; a step that children share counts once."""
        return sum(map(self.num_nodes, self.steps))

    def num_nodes(self, step: int) -> int:
        """Returns how many samples take this step: those of its level of the trees."""
        return len(self.samples) * count_leaves(tuple(fork for fork in self.forks if fork[0] < step))

    @property
    def work(self) -> int:
        """The amount of work, to which the request's time is roughly proportional: pixels x steps of all samples.

        Reference images count as pixels of each sample.
        """
        shapes = self.geometry
        pixels_per_token = shapes.height * shapes.width // shapes.num_tokens
        return (shapes.height * shapes.width + shapes.num_reference_tokens * pixels_per_token) * self.num_steps_taken

    @property
    def field_steps(self) -> tuple[int, ...]:
        """The steps of which `return_fields` are returned."""
        chosen = self.params.return_step_indices
        return tuple(step for step in self.steps if chosen is None or step in chosen)

    def keeps(self, name: str, step: int) -> bool:
        """Tells whether a field of a step is recorded: for its answer, for the debug tensors, or to be decoded."""
        params = self.params
        if name in (params.return_fields or ()) and (params.return_step_indices is None or step in params.return_step_indices):
            return True
        return step in (params.decode_step_indices or ()) if name == "x0" else params.debug_mode

    @property
    def answer_bytes(self) -> int:
        """The number of bytes of the tensors in the answer, without those of the denoising environment."""
        return _answer_bytes(self.params, self.geometry, self.schedule.num_steps, self.steps, self.num_answers)

    @property
    def input_bytes(self) -> int:
        """The number of bytes of the tensors and files that the request has brought: latents, embeddings and images."""
        tensors: list[Tensor | None] = [getattr(self.params, name) for name in TENSORS]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) + sum(map(len, self.params.images or ()))

    def start_latents(self, planned: PlannedSample) -> Tensor | None:
        """Returns the latents of the request that a sample starts from; None if it starts from initial noise."""
        latents = self.params.latents
        return latents if latents is None or latents.ndim == len(self.geometry.latent_shape) else latents[planned.root]


def plan_request(
    params: SamplingParams, model: ModelFacts, limits: Limits, *, images: Sequence[ReferenceImage] | None = None
) -> RequestPlan:
    """Checks a request against the loaded model, and fills in its defaults.

    Args:
        params: The request.
        model: The facts about the model.
        limits: The limits of a request.
        images: The facts of its reference images, where it was planned elsewhere and has come without them; None: its images
            are decoded.

    Raises:
        InvalidRequestError: A value is off the model's grid or above a limit, or an image cannot be decoded.
    """
    images = _plan_images(params, model, limits) if images is None else tuple(images)
    geometry = _plan_geometry(params, model, limits, images)
    schedule = _plan_schedule(params, model, limits, geometry)
    steps = plan_steps(params, schedule.num_steps)
    _check_indices(params, schedule.num_steps, steps)
    if params.decode_step_indices and _image_format(params, steps, schedule.num_steps) == "none":
        rule = "be left out where nothing is decoded"
        refuse("decode_step_indices", rule, list(params.decode_step_indices)[:8], 'give an image_format other than "none"')
    params = with_checked_latents(params, model, geometry)
    samples = plan_samples(params, limits, geometry)
    check_token_ids(params, model, images)
    params = with_checked_embeds(params, model)
    negative = negative_text(params, model)
    guidance, guidances = _plan_guidance(params, model, schedule.num_steps, has_negative=negative is not None)
    prompt, negative_prompt = BranchText.of(params, model), negative if guidance.is_active else None
    rules = _rules(params, schedule, steps) if params.rollout else None
    chosen = _plan_transitions(params, schedule, steps, rules) if params.rollout else None
    if chosen is not None and chosen[steps.start].needs_previous and steps.start > 0:
        rule = "be a step that needs no prediction of the step before"
        refuse(
            "start_step",
            rule,
            f"{steps.start}, a {chosen[steps.start].dynamics} step",
            "start earlier, or with sigmas that begin there",
        )
    if chosen is not None:
        check_forks(params, chosen, steps)
    num_answers = len(samples) * count_leaves(cast(Fork | None, params.fork))
    _check_answer_size(params, limits, geometry, schedule.num_steps, steps, num_answers)
    generator_device = torch.device("cpu") if params.generator_device == "cpu" else model.device
    return RequestPlan(
        params=params,
        request_id=params.request_id or uuid.uuid4().hex,
        samples=samples,
        steps=steps,
        prompt=prompt,
        negative_prompt=negative_prompt,
        geometry=geometry,
        schedule=schedule,
        transitions=chosen,
        guidance=guidance,
        guidances=guidances,
        generator_device=generator_device,
        record=_record(
            params, model, geometry, schedule, guidance, prompt, negative_prompt, generator_device, steps, rules, images
        ),
    )


def _record(
    params: SamplingParams,
    model: ModelFacts,
    geometry: Geometry,
    schedule: Schedule,
    guidance: Guidance,
    prompt: BranchText,
    negative: BranchText | None,
    generator_device: torch.device,
    steps: range,
    rules: tuple[StepRule, ...] | None,
    images: tuple[ReferenceImage, ...],
) -> SamplingRecord:
    return SamplingRecord(
        family=model.family.name,
        variant=model.variant,
        sde_type=params.rollout_sde_type if params.rollout else ODE,
        noise_level=params.rollout_noise_level,
        log_prob_no_const=params.rollout_log_prob_no_const,
        log_prob=params.log_prob,
        guidance_rule=guidance.rule,
        guidance_scale=guidance.scale,
        negative_prompt=None if negative is None else negative.text,
        height=geometry.height,
        width=geometry.width,
        num_inference_steps=schedule.num_steps,
        sigmas=tuple(schedule.sigmas.tolist()),
        timesteps=tuple(schedule.timesteps.tolist()),
        generator_device=generator_device.type,
        model_dtype=str(model.dtype),
        timestep_dtype=str(model.family.timestep_dtype(model.dtype)),
        device=model.device.type,
        embedded_guidance_scale=guidance.embedded,
        guidance_scales=params.guidance_scales,
        rope_axes=model.spec.rope_axes,
        steps=rules,
        start_step=steps.start,
        stop_step=steps.stop if steps.stop < schedule.num_steps else None,
        image_format=_image_format(params, steps, schedule.num_steps),
        prompt_token_ids=params.prompt_token_ids,
        negative_prompt_token_ids=None if negative is None else negative.token_ids,
        prompt_embeds_sha256=prompt.embeds_sha256,
        negative_prompt_embeds_sha256=None if negative is None else negative.embeds_sha256,
        images=images or None,
    )


def _plan_images(params: SamplingParams, model: ModelFacts, limits: Limits) -> tuple[ReferenceImage, ...]:
    """Returns the facts of the request's reference images, of which there are as many as the model takes."""
    most, files, name = model.spec.max_images, params.images or (), model.family.name
    if files and not most:
        refuse("images", f"be left out for {name}, which makes pictures from text alone", len(files), "remove them")
    if most and not files:
        refuse("images", f"be given for {name}", "none", "send the files of the pictures to edit")
    if len(files) > most:
        refuse("images", f"hold at most {most} for this checkpoint of {name}", len(files), "send fewer")
    for field in ("prompt", "negative_prompt"):
        for placeholder in () if model.spec.vision is None else model.spec.vision.placeholders:
            if placeholder in (getattr(params, field) or ""):
                rule = f"be without {placeholder}, which stands for a picture"
                refuse(field, rule, "a text with it", "send pictures as images")
    return check_images(files, limits)


def _first(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)


def plan_geometry(model: ModelFacts, *, height: int, width: int, images: Sequence[ReferenceImage] = ()) -> Geometry:
    """Returns the shapes of a sample of this size, in pixels, beside reference images.

    Raises:
        InvalidRequestError: The size is off the model's grid, or an image has sides that the model does not take.
    """
    unit = model.spec.pixel_unit
    sides = {"height": height, "width": width}
    for field, value in sides.items():
        if value % unit:
            below, above = value // unit * unit, (value // unit + 1) * unit
            remedy = f"use {below} or {above}" if below else f"use {above}"
            refuse(field, f"be a multiple of {unit} for {model.family.name}", value, remedy)
    if model.spec.max_tokens_per_side is not None:
        for (field, value), most in zip(sides.items(), model.spec.max_tokens_per_side, strict=True):
            if value // unit > most:
                refuse(field, f"be at most {most * unit}, where the position table ends", value, "ask for a smaller image")
    return model.family.beside(model.family.geometry(model.spec, height=height, width=width), model.spec, images)


def _plan_geometry(params: SamplingParams, model: ModelFacts, limits: Limits, images: tuple[ReferenceImage, ...]) -> Geometry:
    size = model.family.size_beside(model.spec, images) if images else None
    height, width = size or (model.defaults.height, model.defaults.width)
    geometry = plan_geometry(model, height=params.height or height, width=params.width or width, images=images)
    if geometry.height * geometry.width > limits.max_pixels:
        field = "height" if params.height else "width"
        shown = f"{geometry.width} x {geometry.height}"
        refuse(field, f"keep width x height within {limits.max_pixels} pixels", shown, "ask for a smaller image")
    return geometry


def _plan_guidance(
    params: SamplingParams, model: ModelFacts, num_steps: int, *, has_negative: bool
) -> tuple[Guidance, tuple[Guidance, ...]]:
    """Chooses the scale of classifier-free guidance, and beside it the scale that the model is given as an input.

    Returns the guidance of the step that needs the most, and that of each step.

    There is an unconditional branch only for a request that has a negative prompt, its own or the family's, as in the
    pipelines; without one that guidance is off, whatever was asked for. A model that takes no scale is given none.
    """
    defaults, family, scales = model.defaults, model.family, params.guidance_scales
    if scales is not None:
        _check_scales(params, model, num_steps)
    if defaults.true_cfg_scale is None:
        largest = None if scales is None else max(scales)
        asked = _first(params.true_cfg_scale, largest, params.guidance_scale, defaults.guidance_scale)
        guidance = family.guidance(asked if has_negative else family.guided_above)
    else:
        scale = _first(params.true_cfg_scale, defaults.true_cfg_scale) if has_negative else 1.0
        first = None if scales is None else scales[0]
        embedded = _first(first, params.guidance_scale, defaults.guidance_scale) if model.spec.embeds_guidance else None
        guidance = family.guidance(scale, embedded)
    return guidance, family.guidances(guidance, scales, num_steps, has_negative=guidance.is_active)


def _check_scales(params: SamplingParams, model: ModelFacts, num_steps: int) -> None:
    field, scales, name = "guidance_scales", params.guidance_scales or (), model.family.name
    if len(scales) != num_steps:
        refuse(field, f"hold one scale for each of the {num_steps} steps", len(scales), "send one scale a step")
    if model.defaults.true_cfg_scale is None and params.true_cfg_scale is not None:
        refuse(field, f"be given without true_cfg_scale for {name}", "both", "send one of the two")
    if model.defaults.true_cfg_scale is not None and not model.spec.embeds_guidance:
        refuse(field, "be left out for a model that takes no guidance scale", f"{len(scales)} scales", "use true_cfg_scale")


def _plan_schedule(params: SamplingParams, model: ModelFacts, limits: Limits, geometry: Geometry) -> Schedule:
    if params.sigmas is not None:
        num_steps, field = len(params.sigmas) - 1, "sigmas"
    else:
        defaults = model.defaults
        num_steps, field = params.num_inference_steps or defaults.num_inference_steps, "num_inference_steps"
        if model.spec.sample_sigmas is not None and num_steps != defaults.num_inference_steps:
            rule = f"be {defaults.num_inference_steps}, the number of the checkpoint's sample_sigmas"
            refuse(field, rule, num_steps, "leave it out, or send the noise levels of every step as sigmas")
    if num_steps > limits.max_steps:
        refuse(field, f"ask for at most {limits.max_steps} steps", num_steps, "use fewer steps")
    if params.sigmas is not None:
        return explicit_schedule(model.schedule_config, params.sigmas)
    base = model.family.base_grid(model.spec, model.schedule_config, num_steps)
    mu = model.family.shift_exponent(model.schedule_config, geometry, num_steps)
    return shifted_schedule(model.schedule_config, base, num_tokens=geometry.num_tokens, mu=mu)


def _image_format(params: SamplingParams, steps: range, num_steps: int) -> ImageFormat:
    """Returns the form of the picture; of a state before the end there is none, unless the request asks for one."""
    return params.image_format or ("tensor" if steps.stop == num_steps else "none")


def _rules(params: SamplingParams, schedule: Schedule, steps: range) -> tuple[StepRule, ...] | None:
    """Returns the rule of each step where the record needs it; None where it follows from the dynamics and the chosen steps."""
    rules = params.step_rules
    if rules is not None and len(rules) != schedule.num_steps:
        field = "rollout_steps" if params.rollout_steps is not None else "rollout_noise_levels"
        refuse(field, f"hold one entry for each of the {schedule.num_steps} steps", len(rules), "send one entry a step")
    if rules is None and len(steps) < schedule.num_steps:
        # From the steps that have a density and were run alone, the rules of the others do not follow.
        return rules_of(
            schedule.sigmas,
            sde_type=params.rollout_sde_type,
            noise_level=params.rollout_noise_level,
            sde_step_indices=params.rollout_sde_step_indices,
        )
    return rules


def _plan_transitions(
    params: SamplingParams, schedule: Schedule, steps: range, rules: tuple[StepRule, ...] | None
) -> tuple[Transition, ...]:
    if rules is not None:
        chosen = transitions_of(schedule.sigmas, rules)
    else:
        chosen = transitions(
            schedule.sigmas,
            sde_type=params.rollout_sde_type,
            noise_level=params.rollout_noise_level,
            sde_step_indices=params.rollout_sde_step_indices,
        )
    growth = amplification(chosen[steps.start : steps.stop])
    if growth > _MAX_AMPLIFICATION:
        shown = (
            f"{params.rollout_noise_level}, which grows the latents {growth:.0e} times over these {schedule.num_steps} steps"
        )
        refuse(
            "rollout_noise_level",
            "keep the trajectory within float32",
            shown,
            "use a lower noise level or fewer stochastic steps",
        )
    return chosen


def _answer_bytes(params: SamplingParams, geometry: Geometry, num_steps: int, steps: range, num_samples: int) -> int:
    latent_bytes = 4 * math.prod(geometry.latent_shape)
    states = 0
    if params.rollout and params.rollout_debug_mode:
        states += 3 * num_steps
    if params.rollout and params.rollout_return_dit_trajectory:
        states += len(steps) + 1 if params.rollout_return_step_indices is None else len(params.rollout_return_step_indices)
    pixel_bytes = geometry.colors * geometry.frames * geometry.height * geometry.width
    if params.return_fields is not None:
        chosen = params.rollout_return_step_indices
        rows = len(steps) if chosen is None else sum(step in steps for step in chosen)
        states += rows * sum(name != "std" for name in params.return_fields)
    # A PNG of noise is no larger than its pixels, but for some headers.
    picture = {"tensor": 4 * pixel_bytes, "uint8": pixel_bytes, "png": pixel_bytes, "none": latent_bytes}[
        _image_format(params, steps, num_steps)
    ]
    return num_samples * (states * latent_bytes + picture * (1 + len(params.decode_step_indices or ())))


def _check_answer_size(
    params: SamplingParams, limits: Limits, geometry: Geometry, num_steps: int, steps: range, num_samples: int
) -> None:
    total = _answer_bytes(params, geometry, num_steps, steps, num_samples)
    if total > limits.max_answer_bytes:
        rule = f"keep the answer within {limits.max_answer_bytes / 2**30:g} GiB"
        shown = f"{num_samples} samples with {total / 2**30:.1f} GiB of tensors"
        refuse("num_outputs_per_prompt", rule, shown, "ask for fewer samples, steps, pixels or recorded tensors")


def _check_indices(params: SamplingParams, num_steps: int, steps: range) -> None:
    for field, indices, first, last in (
        ("rollout_sde_step_indices", params.rollout_sde_step_indices, 0, num_steps - 1),
        ("rollout_return_step_indices", params.rollout_return_step_indices, steps.start, steps.stop),
        ("decode_step_indices", params.decode_step_indices, steps.start, steps.stop - 1),
    ):
        for outside in (index for index in indices or () if not first <= index <= last):
            run = f"{num_steps} steps" if len(steps) == num_steps else f"a run of the steps {steps.start} to {steps.stop - 1}"
            refuse(field, f"lie in {first}..{last} for {run}", outside, "remove it")
