"""Rollouts that a server is to score: what is sent, and what is made of the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowroll.replay.scoring import Scores
from flowroll.replay.sources import Place, Source, check_states, sources_of, steps_of
from flowroll.types import RecordedSteps, Rollout, ScoreAnswer, ScoreParams
from flowroll.types.arguments import Integers

_CPU = Place(device=torch.device("cpu"), dtype=None)


def score_params(
    rollouts: Sequence[Rollout],
    steps: Integers | None,
    *,
    log_probs_only: bool,
    min_weight_version: str | None = None,
    policy: str | None = None,
) -> ScoreParams:
    """Returns what to ask a server.

    Args:
        rollouts: The rollouts of one or several requests, with env and trajectory.
        steps: Which steps, 0-based; None: all, for rollouts of one length.
        log_probs_only: Leave means and velocities out.
        min_weight_version: Refuse weights that are older than this version.
        policy: The policy to compute with; None: the default.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    sources = sources_of(rollouts, _CPU)
    chosen = steps_of(sources, steps)
    return ScoreParams(
        samples=tuple(_recorded(source, chosen) for source in sources),
        log_probs_only=log_probs_only,
        min_weight_version=min_weight_version,
        policy=policy,
    )


def scores_of(answer: ScoreAnswer) -> Scores:
    """Returns the answer to what `score_params` made, as `score` gives it, on the CPU."""
    samples = answer.samples
    return Scores(
        steps=samples[0].steps,
        log_probs=torch.stack([sample.log_probs for sample in samples]),
        stds=torch.stack([sample.stds for sample in samples]),
        means=tuple(sample.means for sample in samples if sample.means is not None),
        velocities=tuple(sample.velocities for sample in samples if sample.velocities is not None),
        weight_version=answer.weight_version,
        policy=answer.policy,
        exactness=answer.exactness,
    )


def _recorded(source: Source, steps: Sequence[int]) -> RecordedSteps:
    for step in steps:
        check_states(source, step)
    trajectory = source.trajectory
    rows = [trajectory.latent_step_indices.index(step) for step in steps]
    following = [trajectory.latent_step_indices.index(step + 1) for step in steps]
    return RecordedSteps(
        steps=tuple(steps),
        latents=trajectory.latents[rows],
        next_latents=trajectory.latents[following],
        denoising_env=source.env,
        sampling=source.rollout.sampling,
        sde_step_indices=source.rollout.sde_step_indices,
    )
