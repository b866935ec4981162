"""Recorded steps, scored on the engine: for trainers that recompute old log-probs where the rollouts are made.

Every step is a forward of its own, by the code that replay uses. Owns every reason why a step cannot be scored.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import plan_geometry
from flowroll.errors import InvalidRequestError
from flowroll.families import Geometry, Recipe, StepScore
from flowroll.families.base import MAX_TEXT_TOKENS
from flowroll.types import DenoisingEnv, EnvValue, RecordedSteps, SampleScores, SamplingParams, ScoreParams, all_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """One accepted request.

    Attributes:
        params: What was asked for, checked against the model.
        request_id: Given or made.
    """

    params: ScoreParams
    request_id: str

    @property
    def work(self) -> int:
        """What its time is roughly proportional to: pixels x steps x samples."""
        return sum(sample.sampling.height * sample.sampling.width * len(sample.steps) for sample in self.params.samples)


def plan_score(params: ScoreParams, model: LoadedModel, limits: Limits) -> ScorePlan:
    """Checks every step that is to be scored.

    Raises:
        InvalidRequestError: A sample does not fit the model or is above a limit; the field begins with `samples[i].`.
    """
    count = sum(len(sample.steps) for sample in params.samples)
    if count > limits.max_scores:
        _refuse("samples", f"hold at most {limits.max_scores} steps in all", count, "send several requests")
    states = 0 if params.log_probs_only else 2
    total = sum(states * 4 * sample.latents.numel() for sample in params.samples)
    if total > limits.max_answer_bytes:
        rule = f"keep the answer within {limits.max_answer_bytes / 2**30:g} GiB"
        _refuse("samples", rule, f"{total / 2**30:.1f} GiB of tensors", "send several requests, or ask for log_probs_only")
    for index, sample in enumerate(params.samples):
        try:
            check_sample(sample, model, limits)
        except InvalidRequestError as error:
            raise error.within(f"samples[{index}]") from None
    return ScorePlan(params=params, request_id=params.request_id or uuid.uuid4().hex)


def check_sample(sample: RecordedSteps, model: LoadedModel, limits: Limits) -> None:
    """Checks the steps of one sample against the model.

    Raises:
        InvalidRequestError: They do not fit it.
    """
    record = sample.sampling
    _check_record(sample, model, limits)
    try:
        recipe = recipe_of(sample, model, device="cpu")
        geometry = plan_geometry(model, height=record.height, width=record.width)
    except InvalidRequestError as error:
        raise error.within("sampling") from None
    for field, tensor in (("latents", sample.latents), ("next_latents", sample.next_latents)):
        if tuple(tensor.shape[1:]) != geometry.latent_shape:
            size = f"{record.height} x {record.width}"
            rule = f"hold states of the shape {list(geometry.latent_shape)} at {size}"
            _refuse(field, rule, list(tensor.shape[1:])[:8], "send one state per step")
        if not tensor.isfinite().all():
            _refuse(field, "be finite", "NaN or infinity", "send the states as they were recorded")
    recipe.check_env(sample.denoising_env)
    _check_env(sample.denoising_env, model, geometry)


def recipe_of(sample: RecordedSteps, model: LoadedModel, *, device: torch.device | str) -> Recipe:
    """How the sample's steps are taken."""
    return Recipe.of(sample.sampling, model.family, sde_step_indices=sample.sde_step_indices, device=device)


def forward_rows(sample: RecordedSteps, recipe: Recipe, *, log_probs_only: bool) -> list[int]:
    """The rows of the sample that need a forward."""
    steps = enumerate(sample.steps)
    return [row for row, step in steps if not log_probs_only or recipe.transitions[step].is_stochastic]


def velocities_of(
    model: LoadedModel,
    transformer: Any,
    recipe: Recipe,
    latents: Float[Tensor, " steps *latent"],
    steps: Sequence[int],
    env: DenoisingEnv,
    before_step: Callable[[], None],
) -> list[Float[Tensor, " *latent"]]:
    """The velocity of each step; on several ranks, every rank does this at the same time.

    Args:
        model: The model, or this rank's part.
        transformer: The denoiser, with an adapter or without.
        recipe: Of the sample.
        latents: x before each step, on the model's device.
        steps: Which steps.
        env: On the model's device.
        before_step: Called before every step; raises to stop.
    """
    found = []
    for row, step in zip(latents, steps, strict=True):
        before_step()
        # Copied: a row of a stack lies anywhere, and bits can depend on that.
        found.append(recipe.velocity(transformer, row.clone(), step, env, run=model.run))
    return found


def sample_scores(
    sample: RecordedSteps, recipe: Recipe, velocities: Mapping[int, Tensor], *, log_probs_only: bool
) -> SampleScores:
    """The answer for one sample.

    Args:
        sample: Its states.
        recipe: Its steps.
        velocities: By row; a row without one has no density.
        log_probs_only: Leave means and velocities out.

    Raises:
        InvalidRequestError: A forward gave NaN or infinity.
    """
    scores: dict[int, StepScore] = {}
    for row, velocity in velocities.items():
        latents, following = (states[row].to(velocity.device) for states in (sample.latents, sample.next_latents))
        scores[row] = recipe.evaluate(velocity, latents, following, sample.steps[row])
        finite = (all_finite(velocity), all_finite(scores[row].mean), all_finite(scores[row].log_prob))
        if not all(finite):
            shown = f"NaN or infinity at step {sample.steps[row]}"
            _refuse("latents", "give finite velocities and log-probs", shown, "check the states, the env, and the weights")
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


def _check_record(sample: RecordedSteps, model: LoadedModel, limits: Limits) -> None:
    record, steps = sample.sampling, sample.sampling.num_inference_steps
    try:
        model.adapters.record(None if record.lora is None else record.lora.name)
    except InvalidRequestError as error:
        raise error.within("sampling") from None
    if record.family != model.family.name:
        rule = f"be {model.family.name}, which this engine has"
        _refuse("sampling.family", rule, record.family[:80], "send it to that family's engine")
    dtypes = {"model_dtype": model.dtype, "timestep_dtype": model.family.timestep_dtype(model.dtype)}
    for name, dtype in dtypes.items():
        if (got := getattr(record, name)) != str(dtype):
            _refuse(f"sampling.{name}", f"be {dtype}, which this engine has", got[:80], "start an engine in that dtype")
    try:
        # The rules of a request are the rules of its record.
        SamplingParams(
            prompt="",
            height=record.height,
            width=record.width,
            sigmas=record.sigmas,
            guidance_scale=record.guidance_scale,
            sde_type=record.sde_type,
            noise_level=record.noise_level,
        )
    except InvalidRequestError as error:
        raise error.within("sampling") from None
    if not torch.tensor(record.timesteps, dtype=torch.float32).isfinite().all():
        _refuse("sampling.timesteps", "be finite", "NaN or infinity", "use the record as it was sent")
    if steps > limits.max_steps:
        _refuse("sampling.num_inference_steps", f"be at most {limits.max_steps}", steps, "use fewer steps")
    if record.height * record.width > limits.max_pixels:
        shown = f"{record.width} x {record.height}"
        _refuse("sampling.height", f"keep width x height within {limits.max_pixels} pixels", shown, "score smaller images")
    for field, indices in (("steps", sample.steps), ("sde_step_indices", sample.sde_step_indices or ())):
        if outside := [index for index in indices if not 0 <= index < steps]:
            _refuse(field, f"lie in 0..{steps - 1}", outside[0], "count steps from 0")


def _check_env(env: DenoisingEnv, model: LoadedModel, geometry: Geometry) -> None:
    if env.image_kwargs or env.guidance is not None:
        field = "denoising_env.image_kwargs" if env.image_kwargs else "denoising_env.guidance"
        _refuse(field, f"be empty for {model.family.name}", "a value", "use the env of the rollout")
    _check_branch(env.pos_cond_kwargs, "denoising_env.pos_cond_kwargs", model, geometry)
    if env.neg_cond_kwargs is not None:
        _check_branch(env.neg_cond_kwargs, "denoising_env.neg_cond_kwargs", model, geometry)


def _check_branch(branch: Mapping[str, EnvValue], where: str, model: LoadedModel, geometry: Geometry) -> None:
    family, width = model.family, model.spec.text_width
    remedy = "use the env of the rollout"
    known = (family.embeds_key, *family.env_schema)
    for key in branch:
        if key not in known:
            _refuse(f"{where}.{key[:80]}", f"be one of {', '.join(known)} for {family.name}", "another name", remedy)
    embeds = branch.get(family.embeds_key)
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[1] != width or embeds.dtype != model.dtype:
        rule = f"be a tensor [tokens, {width}] of {model.dtype}"
        _refuse(f"{where}.{family.embeds_key}", rule, _described(embeds), remedy)
    if not 1 <= len(embeds) <= MAX_TEXT_TOKENS or not embeds.isfinite().all():
        rule = f"hold 1 to {MAX_TEXT_TOKENS} tokens of finite numbers"
        _refuse(f"{where}.{family.embeds_key}", rule, _described(embeds), remedy)
    expected = {**family.image_arguments(geometry), "txt_seq_lens": [len(embeds)]}
    for key in family.env_schema:
        value = branch.get(key)
        if key in expected:
            # The lengths are metadata, which no forward needs.
            if not (value is None and key == "txt_seq_lens") and (isinstance(value, Tensor) or value != expected[key]):
                _refuse(f"{where}.{key}", f"be {expected[key]} for these latents and tokens", _described(value), remedy)
        elif value is not None and not _is_mask(value, len(embeds)):
            rule = f"be a tensor [{len(embeds)}] of booleans or integers"
            _refuse(f"{where}.{key}", rule, _described(value), remedy)


def _is_mask(value: EnvValue, tokens: int) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == (tokens,) and not value.is_floating_point()


def _described(value: EnvValue | None) -> str:
    if isinstance(value, Tensor):
        finite = "" if value.isfinite().all() else " with NaN or infinity"
        return f"{list(value.shape)[:8]} of {value.dtype}{finite}"
    return "nothing" if value is None else repr(value)[:80]


def _refuse(field: str, rule: str, value: object, remedy: str) -> NoReturn:
    raise InvalidRequestError(f"{field} must {rule}, got {value}; {remedy}.", field=field)
