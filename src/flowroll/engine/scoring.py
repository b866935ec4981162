"""Recomputes the log-probs of recorded steps, for trainers that do so on the engine that made the rollouts.

Every step has its own forward, by the code that replay uses. This module owns all reasons for which a step is refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.facts import ModelFacts
from flowroll.engine.plan import plan_geometry
from flowroll.errors import InvalidRequestError
from flowroll.families import Geometry, Recipe, StepScore
from flowroll.families.conditioning import IMAGE_TOKENS, REFERENCE_TOKENS, SLOTS, TOKENS, ConditioningField
from flowroll.sampling.base import StepRule
from flowroll.types import (
    DenoisingEnv,
    EnvValue,
    Number,
    RecordedSteps,
    ReferenceImage,
    SampleScores,
    SamplingParams,
    ScoreParams,
    StepOptions,
    all_finite,
)
from flowroll.types.rules import refuse

_REMEDY = "use the env of the rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """A checked request to recompute log-probs.

    Attributes:
        params: The request, checked against the model.
        request_id: The id of the request: the given one, or a new one.
        held_policy: The policy whose weights must be in place meanwhile; None: those that the engine was last given.
    """

    params: ScoreParams
    request_id: str
    held_policy: str | None = None

    @property
    def work(self) -> int:
        """The amount of work, to which the request's time is roughly proportional: pixels x steps, summed over samples."""
        return sum(sample.sampling.height * sample.sampling.width * len(sample.steps) for sample in self.params.samples)

    @property
    def answer_bytes(self) -> int:
        """The number of bytes of the tensors in the answer, without its log-probs."""
        return _answer_bytes(self.params)


def plan_score(params: ScoreParams, model: ModelFacts, limits: Limits) -> ScorePlan:
    """Checks every step whose log-prob is to be recomputed.

    Raises:
        InvalidRequestError: A sample does not fit the model or is above a limit; the field begins with `samples[i].`.
    """
    count = sum(len(sample.steps) for sample in params.samples)
    if count > limits.max_scores:
        refuse("samples", f"hold at most {limits.max_scores} steps in all", count, "send several requests")
    total = _answer_bytes(params)
    if total > limits.max_answer_bytes:
        rule = f"keep the answer within {limits.max_answer_bytes / 2**30:g} GiB"
        refuse("samples", rule, f"{total / 2**30:.1f} GiB of tensors", "send several requests, or ask for log_probs_only")
    for index, sample in enumerate(params.samples):
        try:
            check_sample(sample, model, limits, log_probs_only=params.log_probs_only)
        except InvalidRequestError as error:
            raise error.within(f"samples[{index}]") from None
    return ScorePlan(params=params, request_id=params.request_id or uuid.uuid4().hex)


def _answer_bytes(params: ScoreParams) -> int:
    states = 0 if params.log_probs_only else 2
    return sum(states * 4 * sample.latents.numel() for sample in params.samples)


def check_sample(sample: RecordedSteps, model: ModelFacts, limits: Limits, *, log_probs_only: bool = False) -> None:
    """Checks the steps of one sample against the model.

    Raises:
        InvalidRequestError: The steps do not fit the model.
    """
    record = sample.sampling
    _check_record(sample, model, limits)
    try:
        recipe = recipe_of(sample, model, device="cpu")
        geometry = plan_geometry(model, height=record.height, width=record.width, images=record.images or ())
    except InvalidRequestError as error:
        raise error.within("sampling") from None
    for field, tensor in (("latents", sample.latents), ("next_latents", sample.next_latents)):
        if tuple(tensor.shape[1:]) != geometry.latent_shape:
            size = f"{record.height} x {record.width}"
            rule = f"hold states of the shape {list(geometry.latent_shape)} at {size}"
            refuse(field, rule, list(tensor.shape[1:])[:8], "send one state per step")
        if not tensor.isfinite().all():
            refuse(field, "be finite", "NaN or infinity", "send the states as they were recorded")
    for step in () if log_probs_only else sample.steps:
        if recipe.transitions[step].needs_previous and step - 1 not in sample.steps:
            rule = f"hold {step - 1} beside {step}, whose mean depends on the step before"
            refuse("steps", rule, list(sample.steps), "send both steps, or ask for log_probs_only")
    recipe.check_env(sample.denoising_env)
    _check_env(sample.denoising_env, record.embedded_guidance_scale, model, geometry)


def recipe_of(sample: RecordedSteps, model: ModelFacts, *, device: torch.device | str) -> Recipe:
    """Returns the recipe by which the sample's steps are taken."""
    return Recipe.of(sample.sampling, model.family, sde_step_indices=sample.sde_step_indices, device=device)


def forward_rows(sample: RecordedSteps, recipe: Recipe, *, log_probs_only: bool) -> list[int]:
    """Returns the rows of the sample that need a forward: all, or, for log-probs only, those of stochastic steps."""
    steps = enumerate(sample.steps)
    return [row for row, step in steps if not log_probs_only or recipe.transitions[step].is_stochastic]


def sample_scores(
    sample: RecordedSteps, recipe: Recipe, velocities: Mapping[int, Tensor], *, log_probs_only: bool
) -> SampleScores:
    """Makes the answer for one sample.

    Args:
        sample: The sample, with the latents before and after each step.
        recipe: The recipe by which its steps are taken.
        velocities: The velocities by row. A row without a velocity is a deterministic step, whose log-prob is 0.
        log_probs_only: Whether means and velocities are left out of the answer.

    Raises:
        InvalidRequestError: A velocity, mean or log-prob is NaN or infinity.
    """
    scores: dict[int, StepScore] = {}
    for row, velocity in velocities.items():
        latents, following = (states[row].to(velocity.device) for states in (sample.latents, sample.next_latents))
        previous: Tensor | None = None
        if recipe.transitions[step := sample.steps[row]].needs_previous:
            before = sample.steps.index(step - 1)
            previous = recipe.clean_prediction(velocities[before], sample.latents[before].to(velocity.device), step - 1)
        scores[row] = recipe.evaluate(velocity, latents, following, step, previous)
        finite = (all_finite(velocity), all_finite(scores[row].mean), all_finite(scores[row].log_prob))
        if not all(finite):
            shown = f"NaN or infinity at step {sample.steps[row]}"
            refuse("latents", "give finite velocities and log-probs", shown, "check the states, the env, and the weights")
    none = torch.zeros((), dtype=torch.float32)
    return SampleScores(
        steps=sample.steps,
        log_probs=torch.stack([scores[row].log_prob.cpu() if row in scores else none for row in range(len(sample.steps))]),
        stds=torch.tensor([recipe.transitions[step].std for step in sample.steps], dtype=torch.float32),
        means=None if log_probs_only else _stacked([score.mean for score in scores.values()]),
        velocities=None if log_probs_only else _stacked([score.velocity for score in scores.values()]),
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.to(torch.float32) for tensor in tensors]).cpu()


def _check_record(sample: RecordedSteps, model: ModelFacts, limits: Limits) -> None:
    record, steps = sample.sampling, sample.sampling.num_inference_steps
    if record.family != model.family.name:
        rule = f"be {model.family.name}, which this engine has"
        refuse("sampling.family", rule, record.family[:80], "send it to that family's engine")
    dtypes = {"model_dtype": model.dtype, "timestep_dtype": model.family.timestep_dtype(model.dtype)}
    for name, dtype in dtypes.items():
        if (got := getattr(record, name)) != str(dtype):
            refuse(f"sampling.{name}", f"be {dtype}, which this engine has", got[:80], "start an engine in that dtype")
    try:
        # A record obeys the rules of a request. It uses the short names of the fields.
        names = ("height", "width", "sigmas", "guidance_scale", "sde_type", "noise_level")
        chosen = sample.sde_step_indices
        SamplingParams(
            prompt="",
            rollout_sde_step_indices=None
            if chosen is None or record.steps is not None
            else tuple({step for step in chosen if 0 <= step < steps}),
            rollout_steps=None if record.steps is None else tuple(map(_options_of, record.steps)),
            **{name: getattr(record, name) for name in names},
        )
    except InvalidRequestError as error:
        raise error.within("sampling") from None
    if record.rope_axes not in (None, model.spec.rope_axes):
        refuse("sampling.rope_axes", f"be {model.spec.rope_axes}, which this model has", record.rope_axes[:8], "use its record")
    _check_images(record.images or (), model)
    _check_embedded(record.embedded_guidance_scale, model)
    if not torch.tensor(record.timesteps, dtype=torch.float32).isfinite().all():
        refuse("sampling.timesteps", "be finite", "NaN or infinity", "use the record as it was sent")
    if steps > limits.max_steps:
        refuse("sampling.num_inference_steps", f"be at most {limits.max_steps}", steps, "use fewer steps")
    if record.height * record.width > limits.max_pixels:
        shown = f"{record.width} x {record.height}"
        refuse("sampling.height", f"keep width x height within {limits.max_pixels} pixels", shown, "score smaller images")
    for field, indices in (("steps", sample.steps), ("sde_step_indices", sample.sde_step_indices or ())):
        if outside := [index for index in indices if not 0 <= index < steps]:
            refuse(field, f"lie in 0..{steps - 1}", outside[0], "count steps from 0")


def _options_of(rule: StepRule) -> StepOptions:
    return StepOptions(dynamics=rule.dynamics, noise_level=rule.noise_level)


def _check_images(images: Sequence[ReferenceImage], model: ModelFacts) -> None:
    """Checks that a record has as many reference images as the model takes, of sizes that pictures have."""
    most = model.spec.max_images
    if not min(most, 1) <= len(images) <= most:
        rule = f"hold 1 to {most} for this model" if most else "be null for this model"
        refuse("sampling.images", rule, len(images), "use the record as it was sent")
    for index, image in enumerate(images):
        if min(image.height, image.width) < 1:
            shown = f"{image.width} x {image.height}"
            refuse(f"sampling.images[{index}]", "have a size", shown, "use the record as it was sent")


def _check_embedded(scale: Number | None, model: ModelFacts) -> None:
    """Checks that a record has a scale for the model's own guidance input, if and only if the model has one."""
    if (scale is not None) != model.spec.embeds_guidance:
        rule = "be a number for this model" if model.spec.embeds_guidance else "be null for this model"
        shown = "null" if scale is None else scale
        refuse("sampling.embedded_guidance_scale", rule, shown, "use the record as it was sent")


def _check_env(env: DenoisingEnv, embedded: Number | None, model: ModelFacts, geometry: Geometry) -> None:
    """Checks an environment against the conditioning fields that the family declares."""
    family = model.family
    for place, is_given in (("image_kwargs", bool(env.image_kwargs)), ("guidance", env.guidance is not None)):
        if is_given and not family.conditioning.in_place(place):
            refuse(f"denoising_env.{place}", f"be empty for {family.name}", "a value", _REMEDY)
    if env.guidance is not None:
        (field,) = family.conditioning.in_place("guidance")
        _check_tensor(field, env.guidance, "denoising_env.guidance", model, {})
        if env.guidance.item() != torch.tensor(embedded, dtype=torch.float32).item():
            refuse("denoising_env.guidance", f"be the record's {embedded}", f"{env.guidance.item():g}", _REMEDY)
    _check_part(env.image_kwargs, "image_kwargs", model, {REFERENCE_TOKENS: geometry.num_reference_tokens})
    for place in ("pos_cond_kwargs", "neg_cond_kwargs"):
        if (branch := getattr(env, place)) is not None:
            _check_branch(branch, place, model, geometry)


def _check_branch(branch: Mapping[str, EnvValue], place: str, model: ModelFacts, geometry: Geometry) -> None:
    family = model.family
    embeds = branch.get(family.embeds_key)
    tokens = len(embeds) if isinstance(embeds, Tensor) and embeds.ndim else 0
    sizes = {TOKENS: tokens, IMAGE_TOKENS: geometry.num_tokens, SLOTS: tokens + geometry.num_tokens // 4}
    _check_part(branch, place, model, sizes, family.size_fields(geometry, tokens, model.dtype))


def _check_part(
    values: Mapping[str, EnvValue],
    place: str,
    model: ModelFacts,
    sizes: Mapping[str, int],
    expected: Mapping[str, EnvValue] | None = None,
) -> None:
    """Checks one part of an environment.

    Args:
        values: The values of the part's fields, by name.
        place: The name of the part.
        model: The facts about the model.
        sizes: The sizes that the part itself decides, by name.
        expected: The values of the fields that follow from the size of the image and the number of tokens.
    """
    where, fields, expected = f"denoising_env.{place}", model.family.conditioning.in_place(place), expected or {}
    known = [field.name for field in fields]
    for key in values:
        if key not in known:
            refuse(f"{where}.{key[:80]}", f"be one of {', '.join(known)} for {model.family.name}", "another name", _REMEDY)
    for field in fields:
        value, name = values.get(field.name), f"{where}.{field.name}"
        if value is None and not field.is_required:
            continue
        if field.is_tensor:
            _check_tensor(field, value, name, model, sizes)
        if field.name in expected and not _same_value(value, expected[field.name]):
            shown = expected[field.name] if not field.is_tensor else "what the pipeline makes"
            refuse(name, f"be {shown} for these latents and tokens", _described(value), _REMEDY)


def _check_tensor(
    field: ConditioningField, value: EnvValue | None, name: str, model: ModelFacts, sizes: Mapping[str, int]
) -> None:
    """Checks the shape and the dtype of one tensor, and that its numbers are finite."""
    assert field.shape is not None
    shape = field.sizes({**model.spec.widths, **sizes})
    dtype = model.dtype if field.dtype == "model" else torch.float32
    is_text = field is model.family.conditioning.embeds
    is_index = field.dtype == "index"
    fits = isinstance(value, Tensor) and (
        not value.is_floating_point() and not value.is_complex() if is_index else value.dtype == dtype
    )
    if not (fits and isinstance(value, Tensor) and list(value.shape) == shape):
        shown = [TOKENS if is_text and size == TOKENS else length for size, length in zip(field.shape, shape, strict=True)]
        kind = "booleans or integers" if is_index else dtype
        refuse(name, f"be a tensor [{', '.join(map(str, shown))}] of {kind}", _described(value), _REMEDY)
    assert isinstance(value, Tensor)
    most = model.family.max_text_tokens
    if is_text and (not 1 <= len(value) <= most or not value.isfinite().all()):
        refuse(name, f"hold 1 to {most} tokens of finite numbers", _described(value), _REMEDY)
    if not is_index and not value.isfinite().all():
        refuse(name, "hold finite numbers", _described(value), _REMEDY)


def _same_value(value: EnvValue | None, expected: EnvValue) -> bool:
    if isinstance(value, Tensor) and isinstance(expected, Tensor):
        # Integers may be of any width.
        return torch.equal(value.cpu().to(expected.dtype), expected)
    return not isinstance(value, Tensor) and value == expected


def _described(value: EnvValue | None) -> str:
    if isinstance(value, Tensor):
        finite = "" if value.isfinite().all() else " with NaN or infinity"
        return f"{list(value.shape)[:8]} of {value.dtype}{finite}"
    return "nothing" if value is None else repr(value)[:80]
