"""Ways to spoil what a trainer gets, one mistake at a time: a run that learns all the same would prove nothing.

Owns the mistakes; the loop applies the one that is asked for, between the server and the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from flowroll import Rollout


def shuffled(rewards: Sequence[float], generator: torch.Generator) -> list[float]:
    """The same rewards, handed to the wrong samples."""
    return [rewards[index] for index in torch.randperm(len(rewards), generator=generator).tolist()]


def wrong_env(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Every sample with the environment of a sample of another prompt."""
    # Groups lie side by side: moved by half of all, each lands on another prompt.
    moved = [rollouts[(index + len(rollouts) // 2) % len(rollouts)] for index in range(len(rollouts))]
    return [replace(rollout, denoising_env=other.denoising_env) for rollout, other in zip(rollouts, moved, strict=True)]


def wrong_sigmas(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Every sample with the noise levels and timesteps moved by one step."""
    return [_with_next_sigmas(rollout) for rollout in rollouts]


def permuted_latents(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Every other state of a sample replaced by its neighbour's: next latents that were never next."""
    neighbours = [*rollouts[1:], rollouts[0]]
    return [_with_odd_states_of(other, rollout) for rollout, other in zip(rollouts, neighbours, strict=True)]


SPOIL_ROLLOUTS: Mapping[str, Callable[[Sequence[Rollout]], list[Rollout]]] = {
    "wrong-env": wrong_env,
    "wrong-sigmas": wrong_sigmas,
    "permuted-latents": permuted_latents,
}
SPOIL_REWARDS: Mapping[str, Callable[[Sequence[float], torch.Generator], list[float]]] = {"shuffled-rewards": shuffled}
MISTAKES = (*SPOIL_REWARDS, *SPOIL_ROLLOUTS)


def _with_next_sigmas(rollout: Rollout) -> Rollout:
    assert rollout.dit_trajectory is not None
    sigmas = rollout.dit_trajectory.sigmas
    grid = torch.cat([sigmas[1:-1], sigmas[-2:-1] / 2, sigmas[-1:]])
    timesteps = grid[:-1] * 1000
    return replace(
        rollout,
        dit_trajectory=replace(rollout.dit_trajectory, sigmas=grid, timesteps=timesteps),
        sampling=replace(rollout.sampling, sigmas=tuple(grid.tolist()), timesteps=tuple(timesteps.tolist())),
    )


def _with_odd_states_of(other: Rollout, rollout: Rollout) -> Rollout:
    assert rollout.dit_trajectory is not None and other.dit_trajectory is not None
    latents = rollout.dit_trajectory.latents.clone()
    latents[1::2] = other.dit_trajectory.latents[1::2]
    return replace(rollout, dit_trajectory=replace(rollout.dit_trajectory, latents=latents))
