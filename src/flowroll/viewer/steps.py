"""A sample through its steps: the numbers of each, the pictures that can be had, and the ratio under other weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowroll.errors import FlowrollError
from flowroll.families import FAMILIES
from flowroll.families.recipe import Recipe
from flowroll.replay.remote import score_params
from flowroll.sampling.transition import clean_prediction
from flowroll.types import Rollout
from flowroll.types.pictures import encode_png
from flowroll.viewer.source import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The ratio of each step under the weights that an engine has now.

    Attributes:
        weight_version: Their version.
        ratios: exp(log-prob now - recorded log-prob), by step.
    """

    weight_version: str
    ratios: Mapping[int, float]

    @property
    def is_exact(self) -> bool:
        """Whether every ratio is exactly 1."""
        return all(ratio == 1.0 for ratio in self.ratios.values())

    @property
    def largest_error(self) -> float:
        """The largest |ratio - 1|; infinite where a ratio is NaN."""
        errors = [abs(ratio - 1.0) for ratio in self.ratios.values()]
        return math.inf if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The numbers of one step.

    Attributes:
        index: The step, counted from 0.
        sigma: The noise level before it; 1 is noise.
        std: The std of its noise; 0 where it is deterministic, None where this flowroll does not know its dynamics.
        log_prob: Its log-prob; None where it has no density.
        ratio: Its ratio; None where it was not replayed.
        has_picture: Whether there is a picture of its clean prediction.
    """

    index: int
    sigma: float
    std: float | None
    log_prob: float | None
    ratio: float | None
    has_picture: bool


def steps_of(rollout: Rollout, *, model: Model | None = None, replayed: Replayed | None = None) -> list[Step]:
    """Returns the steps that were run."""
    record, stochastic = rollout.sampling, rollout.sde_step_indices or ()
    stds, ratios = _stds(rollout), {} if replayed is None else replayed.ratios
    return [
        Step(
            index=step,
            sigma=record.sigmas[step],
            std=None if stds is None else stds[step],
            log_prob=rollout.log_probs[step].item() if rollout.log_probs is not None and step in stochastic else None,
            ratio=ratios.get(step),
            has_picture=_stored_picture(rollout, step) is not None
            or (model is not None and clean_latents(rollout, step) is not None),
        )
        for step in record.steps_run
    ]


def picture_of_step(rollout: Rollout, step: int, model: Model | None) -> bytes | None:
    """Returns the picture of a step's clean prediction as PNG, stored or decoded now; None where neither can be had.

    Raises:
        FlowrollError: The engine does not decode it.
    """
    if (stored := _stored_picture(rollout, step)) is not None:
        return encode_png(stored)
    latents = clean_latents(rollout, step) if model is not None else None
    if model is None or latents is None:
        return None
    record = rollout.sampling
    return encode_png(model.decode(latents, height=record.height, width=record.width))


def clean_latents(rollout: Rollout, step: int) -> Tensor | None:
    """Returns the clean latents x - s v that a step predicted, float32; None where the rollout does not hold them."""
    if step not in rollout.sampling.steps_run:
        return None
    velocity, chosen = None, rollout.step_tensors
    if chosen is not None and step in chosen.step_indices:
        row = chosen.step_indices.index(step)
        if (prediction := chosen.tensors.get("x0")) is not None:
            return prediction[row]
        velocity = chosen.tensors["velocity"][row] if "velocity" in chosen.tensors else None
    if velocity is None and rollout.debug_tensors is not None:
        velocity = rollout.debug_tensors.model_output[step]
    trajectory = rollout.dit_trajectory
    if velocity is None or trajectory is None or step not in trajectory.latent_step_indices:
        return None
    latents = trajectory.latents[trajectory.latent_step_indices.index(step)]
    return clean_prediction(latents, velocity, rollout.sampling.sigmas[step])


def replay(rollout: Rollout, model: Model) -> Replayed:
    """Recomputes the log-probs of the steps that have a density and both of their states.

    Raises:
        FlowrollError: The rollout cannot be replayed, or not by this model; the message names the remedy.
    """
    held = () if rollout.dit_trajectory is None else rollout.dit_trajectory.latent_step_indices
    wanted = [step for step in rollout.sde_step_indices or () if step in held and step + 1 in held]
    # Where there is no such step, the reason is in the error that asking for all of them makes.
    answer = model.run_scores(score_params([rollout], wanted or None, log_probs_only=True))
    (scores,) = answer.samples
    assert rollout.log_probs is not None
    ratios = torch.exp(scores.log_probs - rollout.log_probs[list(scores.steps)]).tolist()
    return Replayed(weight_version=answer.weight_version, ratios=dict(zip(scores.steps, ratios, strict=True)))


def _stored_picture(rollout: Rollout, step: int) -> Tensor | bytes | None:
    images = rollout.step_images
    return None if images is None or step not in images.step_indices else images.images[images.step_indices.index(step)]


def _stds(rollout: Rollout) -> list[float] | None:
    record = rollout.sampling
    try:
        family = FAMILIES[record.family]
        recipe = Recipe.of(record, family, sde_step_indices=rollout.sde_step_indices, device="cpu")
    except (KeyError, FlowrollError):
        return None
    return [transition.std for transition in recipe.transitions]
