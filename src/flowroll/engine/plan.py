"""Plans requests: decides everything that is known before any model work. Invalid requests are refused here at the latest."""

from __future__ import annotations

import math
import secrets
import uuid
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.facts import ModelFacts
from flowroll.errors import InvalidRequestError
from flowroll.families import Geometry, Guidance
from flowroll.sampling.base import StepRule
from flowroll.sampling.dynamics import amplification, rules_of, transitions, transitions_of
from flowroll.sampling.schedule import Schedule, explicit_schedule, shifted_schedule
from flowroll.sampling.transition import ODE, Transition
from flowroll.types import MAX_SEED, Number, SamplingParams, SamplingRecord, all_finite, branch_digest
from flowroll.types.starts import PER_SAMPLE
from flowroll.types.tensors import plain_tensor

# Every norm in a model squares the latents; beyond about this value, the squares overflow float32.
_MAX_AMPLIFICATION = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSample:
    """One sample of a request: what it is drawn from.

    Attributes:
        index: The place of the sample among the answers.
        seed: The seed of the sample, which names it.
        init_seed: The seed of its initial noise; None if it starts from latents of the request.
        sde_seed: The seed of the noise of its stochastic steps.
        latents_sha256: The digest of the latents that it starts from; None if it starts from initial noise.
    """

    index: int
    seed: int
    init_seed: int | None
    sde_seed: int
    latents_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """A checked request with every default filled in, which its samples share.

    Attributes:
        params: The parameters of the request; its latents are a copy on the CPU.
        request_id: The id of the request: the given one, or a new one.
        samples: The samples.
        steps: The steps that are run.
        negative_prompt: The negative prompt; None if no unconditional branch runs.
        geometry: The shapes of a sample.
        schedule: The sigma grid.
        transitions: The transitions, one per step; None for plain generation, which takes plain ODE steps.
        guidance: How the conditional and the unconditional branch are combined.
        generator_device: The device on which noise is drawn.
        record: The record of these choices, for the answer.
    """

    params: SamplingParams
    request_id: str
    samples: tuple[PlannedSample, ...]
    steps: range
    negative_prompt: str | None
    geometry: Geometry
    schedule: Schedule
    transitions: tuple[Transition, ...] | None
    guidance: Guidance
    generator_device: torch.device
    record: SamplingRecord

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the samples."""
        return tuple(sample.seed for sample in self.samples)

    @property
    def work(self) -> int:
        """The amount of work, to which the request's time is roughly proportional: pixels x steps x samples."""
        return self.geometry.height * self.geometry.width * len(self.steps) * len(self.samples)

    @property
    def answer_bytes(self) -> int:
        """The number of bytes of the tensors in the answer, without those of the denoising environment."""
        return _answer_bytes(self.params, self.geometry, self.schedule.num_steps, self.steps, len(self.samples))

    def start_latents(self, planned: PlannedSample) -> Tensor | None:
        """Returns the latents of the request that a sample starts from; None if it starts from initial noise."""
        latents = self.params.latents
        return latents if latents is None or latents.ndim == len(self.geometry.latent_shape) else latents[planned.index]


def plan_request(params: SamplingParams, model: ModelFacts, limits: Limits) -> RequestPlan:
    """Checks a request against the loaded model, and fills in its defaults.

    Raises:
        InvalidRequestError: A value is off the model's grid or above a limit.
    """
    defaults = model.family.variants[model.variant]
    geometry = _plan_geometry(params, model, limits)
    schedule = _plan_schedule(params, model, limits, geometry)
    steps = _plan_steps(params, schedule.num_steps)
    _check_indices(params, schedule.num_steps, steps)
    params = _with_checked_latents(params, model, geometry)
    samples = _plan_samples(params, limits, geometry)
    negative = defaults.negative_prompt if params.negative_prompt is None else params.negative_prompt
    guidance = _plan_guidance(params, model, has_negative=negative is not None)
    negative_prompt = negative if guidance.is_active else None
    rules = _rules(params, schedule, steps) if params.rollout else None
    chosen = _plan_transitions(params, schedule, steps, rules) if params.rollout else None
    if chosen is not None and chosen[steps.start].needs_previous and steps.start > 0:
        rule = "be a step that needs no prediction of the step before"
        _refuse(
            "start_step",
            rule,
            f"{steps.start}, a {chosen[steps.start].dynamics} step",
            "start earlier, or with sigmas that begin there",
        )
    _check_answer_size(params, limits, geometry, schedule.num_steps, steps, len(samples))
    generator_device = torch.device("cpu") if params.generator_device == "cpu" else model.device
    return RequestPlan(
        params=params,
        request_id=params.request_id or uuid.uuid4().hex,
        samples=samples,
        steps=steps,
        negative_prompt=negative_prompt,
        geometry=geometry,
        schedule=schedule,
        transitions=chosen,
        guidance=guidance,
        generator_device=generator_device,
        record=_record(params, model, geometry, schedule, guidance, negative_prompt, generator_device, steps, rules),
    )


def _record(
    params: SamplingParams,
    model: ModelFacts,
    geometry: Geometry,
    schedule: Schedule,
    guidance: Guidance,
    negative_prompt: str | None,
    generator_device: torch.device,
    steps: range,
    rules: tuple[StepRule, ...] | None,
) -> SamplingRecord:
    return SamplingRecord(
        family=model.family.name,
        variant=model.variant,
        sde_type=params.rollout_sde_type if params.rollout else ODE,
        noise_level=params.rollout_noise_level,
        log_prob_no_const=params.rollout_log_prob_no_const,
        guidance_rule=guidance.rule,
        guidance_scale=guidance.scale,
        negative_prompt=negative_prompt,
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
        rope_axes=model.spec.rope_axes,
        steps=rules,
        start_step=steps.start,
        image_format=params.image_format,
    )


def _first(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)


def _refuse(field: str, rule: str, value: object, remedy: str) -> None:
    raise InvalidRequestError(f"{field} must {rule}, got {value}; {remedy}.", field=field)


def plan_geometry(model: ModelFacts, *, height: int, width: int) -> Geometry:
    """Returns the shapes of a sample of this size, in pixels.

    Raises:
        InvalidRequestError: The size is off the model's grid.
    """
    unit = model.spec.pixel_unit
    sides = {"height": height, "width": width}
    for field, value in sides.items():
        if value % unit:
            below, above = value // unit * unit, (value // unit + 1) * unit
            remedy = f"use {below} or {above}" if below else f"use {above}"
            _refuse(field, f"be a multiple of {unit} for {model.family.name}", value, remedy)
    if model.spec.max_tokens_per_side is not None:
        for (field, value), most in zip(sides.items(), model.spec.max_tokens_per_side, strict=True):
            if value // unit > most:
                _refuse(field, f"be at most {most * unit}, where the position table ends", value, "ask for a smaller image")
    return model.family.geometry(model.spec, height=height, width=width)


def _plan_geometry(params: SamplingParams, model: ModelFacts, limits: Limits) -> Geometry:
    defaults = model.family.variants[model.variant]
    geometry = plan_geometry(model, height=params.height or defaults.height, width=params.width or defaults.width)
    if geometry.height * geometry.width > limits.max_pixels:
        field = "height" if params.height else "width"
        shown = f"{geometry.width} x {geometry.height}"
        _refuse(field, f"keep width x height within {limits.max_pixels} pixels", shown, "ask for a smaller image")
    return geometry


def _plan_guidance(params: SamplingParams, model: ModelFacts, *, has_negative: bool) -> Guidance:
    """Chooses the scale of classifier-free guidance, and beside it the scale that the model is given as an input.

    A family with two scales runs an unconditional branch only for a request that has a negative prompt, as its pipeline does;
    without one the scale of that guidance is 1, whatever was asked for. A model that takes no scale is given none.
    """
    defaults = model.family.variants[model.variant]
    if defaults.true_cfg_scale is None:
        return model.family.guidance(_first(params.true_cfg_scale, params.guidance_scale, defaults.guidance_scale))
    scale = _first(params.true_cfg_scale, defaults.true_cfg_scale) if has_negative else 1.0
    embedded = _first(params.guidance_scale, defaults.guidance_scale) if model.spec.embeds_guidance else None
    return model.family.guidance(scale, embedded)


def _plan_schedule(params: SamplingParams, model: ModelFacts, limits: Limits, geometry: Geometry) -> Schedule:
    if params.sigmas is not None:
        num_steps, field = len(params.sigmas) - 1, "sigmas"
    else:
        defaults = model.family.variants[model.variant]
        num_steps, field = params.num_inference_steps or defaults.num_inference_steps, "num_inference_steps"
    if num_steps > limits.max_steps:
        _refuse(field, f"ask for at most {limits.max_steps} steps", num_steps, "use fewer steps")
    if params.sigmas is not None:
        return explicit_schedule(model.schedule_config, params.sigmas)
    base = model.family.base_grid(model.spec, model.schedule_config, num_steps)
    mu = model.family.shift_exponent(model.schedule_config, geometry, num_steps)
    return shifted_schedule(model.schedule_config, base, num_tokens=geometry.num_tokens, mu=mu)


def _plan_steps(params: SamplingParams, num_steps: int) -> range:
    start = params.start_step or 0
    if start >= num_steps:
        _refuse("start_step", f"lie in 0..{num_steps - 1} for {num_steps} steps", start, "start earlier")
    return range(start, num_steps)


def _with_checked_latents(params: SamplingParams, model: ModelFacts, geometry: Geometry) -> SamplingParams:
    """Returns the request with a copy of its latents on the CPU, which nobody else can change.

    The latents that a pipeline is given are cast to the dtype of its noise. Here they are, if they are initial noise and lose
    nothing by it; any other cast would be a start from another state than the request says, and is refused.
    """
    latents = params.latents
    if latents is None:
        return params
    shape, count, given = geometry.latent_shape, params.num_samples, tuple(latents.shape)
    if given not in (shape, (count, *shape)):
        rule = f"have the shape {list(shape)} at {geometry.width} x {geometry.height}, or {[count, *shape]} for {count} samples"
        _refuse("latents", rule, list(given)[:8], "send states as a trajectory holds them")
    if latents.dtype not in (torch.float32, model.dtype):
        known = " or ".join(dict.fromkeys(map(str, (torch.float32, model.dtype))))
        _refuse("latents", f"be {known}", latents.dtype, "send them as a trajectory holds them; they are not cast")
    copied = plain_tensor(latents, "latents").clone()
    if not all_finite(copied):
        _refuse("latents", "be finite", "NaN or infinity", "look at the steps that made them")
    if not params.start_step:
        noise = copied.to(model.family.noise_dtype(model.dtype))
        if not torch.equal(noise.to(torch.float32), copied.to(torch.float32)):
            rule = f"be values of {noise.dtype} at step 0, in which the pipeline draws its noise"
            _refuse("latents", rule, "others", f"round them to {noise.dtype} first")
        copied = noise
    return replace(params, latents=copied)


def _rules(params: SamplingParams, schedule: Schedule, steps: range) -> tuple[StepRule, ...] | None:
    """Returns the rule of each step where the record needs it; None where it follows from the dynamics and the chosen steps."""
    rules = params.step_rules
    if rules is not None and len(rules) != schedule.num_steps:
        field = "rollout_steps" if params.rollout_steps is not None else "rollout_noise_levels"
        _refuse(field, f"hold one entry for each of the {schedule.num_steps} steps", len(rules), "send one entry a step")
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
        _refuse(
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
    pixel_bytes = 3 * geometry.frames * geometry.height * geometry.width
    # A PNG of noise is no larger than its pixels, but for some headers.
    picture = {"tensor": 4 * pixel_bytes, "uint8": pixel_bytes, "png": pixel_bytes, "none": latent_bytes}[params.image_format]
    return num_samples * (states * latent_bytes + picture)


def _check_answer_size(
    params: SamplingParams, limits: Limits, geometry: Geometry, num_steps: int, steps: range, num_samples: int
) -> None:
    total = _answer_bytes(params, geometry, num_steps, steps, num_samples)
    if total > limits.max_answer_bytes:
        rule = f"keep the answer within {limits.max_answer_bytes / 2**30:g} GiB"
        shown = f"{num_samples} samples with {total / 2**30:.1f} GiB of tensors"
        _refuse("num_outputs_per_prompt", rule, shown, "ask for fewer samples, steps, pixels or recorded tensors")


def _plan_samples(params: SamplingParams, limits: Limits, geometry: Geometry) -> tuple[PlannedSample, ...]:
    count = params.num_samples
    if count > limits.max_outputs:
        lists = (name for name in PER_SAMPLE if isinstance(getattr(params, name), tuple))
        field = next(lists, "num_outputs_per_prompt")
        _refuse(field, f"ask for at most {limits.max_outputs} samples", count, "send several requests")
    init, sde = (
        value if value is None or isinstance(value, tuple) else (value,) * count
        for value in (params.init_seed, params.sde_seed)
    )
    seeds = params.seeds
    if seeds is None and params.seed is None and (init is not None or params.latents is not None) and sde is not None:
        # Nothing is left to be drawn.
        seeds = sde
    if seeds is None:
        first = params.seed if params.seed is not None else secrets.randbelow(MAX_SEED + 2 - count)
        seeds = tuple(range(first, first + count))
    digests = _digests(params.latents, count, geometry)
    return tuple(
        PlannedSample(
            index=index, seed=seed, init_seed=init_seed if digest is None else None, sde_seed=sde_seed, latents_sha256=digest
        )
        for index, (seed, init_seed, sde_seed, digest) in enumerate(
            zip(seeds, init or seeds, sde or seeds, digests, strict=True)
        )
    )


def _digests(latents: Tensor | None, count: int, geometry: Geometry) -> list[str | None]:
    if latents is None:
        return [None] * count
    states = [latents] if latents.ndim == len(geometry.latent_shape) else list(latents)
    digests: list[str | None] = [branch_digest({"latents": state}) for state in states]
    return digests * (count // len(digests))


def _check_indices(params: SamplingParams, num_steps: int, steps: range) -> None:
    for field, indices, first, last in (
        ("rollout_sde_step_indices", params.rollout_sde_step_indices, 0, num_steps - 1),
        ("rollout_return_step_indices", params.rollout_return_step_indices, steps.start, steps.stop),
    ):
        for outside in (index for index in indices or () if not first <= index <= last):
            run = f"{num_steps} steps" if len(steps) == num_steps else f"a run of the steps {steps.start} to {last - 1}"
            _refuse(field, f"lie in {first}..{last} for {run}", outside, "remove it")
