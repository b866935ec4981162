"""One recorded step, scored on the engine: for trainers that recompute old log-probs where the rollouts are made."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import plan_geometry
from flowroll.errors import InvalidRequestError
from flowroll.families import Recipe, StepScore
from flowroll.types import DenoisingEnv, SamplingRecord


def score_step(
    model: LoadedModel,
    *,
    latents: Float[Tensor, " *latent"],
    next_latents: Float[Tensor, " *latent"],
    step: int,
    env: DenoisingEnv,
    record: SamplingRecord,
    sde_step_indices: Collection[int] | None,
) -> StepScore:
    """Runs and scores one step, by the code that replay uses; see `Engine.score`."""
    _check(model, latents, next_latents, step, record)
    recipe = Recipe.of(record, model.family, sde_step_indices=sde_step_indices, device=model.device)
    recipe.check_env(env)
    with torch.no_grad():
        score = recipe.score(
            model.transformer,
            latents.to(model.device, copy=True),
            next_latents.to(model.device),
            step,
            env.to(model.device),
        )
    return StepScore(
        velocity=score.velocity.to("cpu", torch.float32),
        mean=score.mean.to("cpu", torch.float32),
        std=score.std,
        log_prob=score.log_prob.cpu(),
    )


def _check(model: LoadedModel, latents: Tensor, next_latents: Tensor, step: int, record: SamplingRecord) -> None:
    if record.family != model.family.name:
        _refuse("family", f"be {model.family.name}, which this engine has", record.family, "send it to that family's engine")
    if record.model_dtype != str(model.dtype):
        _refuse("model_dtype", f"be {model.dtype}, which this engine has", record.model_dtype, "start an engine in that dtype")
    if not 0 <= step < record.num_inference_steps:
        _refuse("step", f"lie in 0..{record.num_inference_steps - 1}", step, "count steps from 0")
    expected = plan_geometry(model, height=record.height, width=record.width).latent_shape
    for field, tensor in (("latents", latents), ("next_latents", next_latents)):
        if tuple(tensor.shape) != expected:
            shown = f"{list(tensor.shape)}"
            _refuse(field, f"have the shape {list(expected)} of {record.height} x {record.width}", shown, "send one state")


def _refuse(field: str, rule: str, value: object, remedy: str) -> NoReturn:
    raise InvalidRequestError(f"{field} must {rule}, got {value}; {remedy}.", field=field)
