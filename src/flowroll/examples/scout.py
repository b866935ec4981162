"""Scout and regenerate: many cheap samples, then the best ones again in full, from the same noise.

    python -m flowroll.examples.scout --prompt "a red circle at the top left" --scouts 16 --keep 4

Two ways, side by side. *Few steps*: the scouts take deterministic steps on a short grid; the chosen initial noise is then run
on the full grid with stochastic steps, by `init_seed` alone. *Stop early*: the scouts are the first steps of the full run
itself, rated by the picture that their state predicts; the chosen states go on with the same `sde_seed`, so that nothing is
computed twice and each is bit for bit the run that was never interrupted.

Reference: UniRL and Sol-RL choose rollouts by cheap previews; this shows what of a rollout stays the same between the two runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowroll import Rollout
from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.engine import Engine
from flowroll.engine.loading import silence_model_libraries
from flowroll.examples.shapes.reward import reward

_STEPS = 8
_SCOUT_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one way gave.

    Attributes:
        scouted: The reward of every scout, in the order of the seeds.
        chosen: The seeds of those that were run in full.
        rollouts: These rollouts.
        rewards: Their rewards.
        steps: The denoising steps that all of it took.
    """

    scouted: tuple[float, ...]
    chosen: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    steps: int


def main(arguments: Sequence[str] | None = None) -> dict[str, Found]:
    """Runs both ways and prints what they gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=SHAPES_FAMILIES, default=SHAPES_FAMILIES[0])
    parser.add_argument("--prompt", default="a red circle at the top left")
    parser.add_argument("--scouts", type=int, default=16)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    seeds = tuple(range(options.seed, options.seed + options.scouts))
    silence_model_libraries()
    with Engine(shapes_checkpoint(options.family)) as engine:
        found = {
            "few steps": few_steps(engine, options.prompt, seeds, options.keep),
            "stop early": stop_early(engine, options.prompt, seeds, options.keep),
        }
    for name, one in found.items():
        mean = sum(one.scouted) / len(one.scouted)
        best = sum(one.rewards) / len(one.rewards)
        print(f"{name}: scouts {mean:.3f}, chosen {best:.3f} with seeds {list(one.chosen)}, {one.steps} steps")
    return found


def few_steps(engine: Engine, prompt: str, seeds: Sequence[int], keep: int) -> Found:
    """Scouts on a short grid without noise; the chosen x_T are run on the full grid, each with the noise of its own seed."""
    before = engine.scheduler.load().steps
    scouts = engine.rollout(prompt, seeds=seeds, num_inference_steps=_SCOUT_STEPS, sde_type="ode", debug_mode=False)
    rewards = [_reward(scout, prompt) for scout in scouts]
    chosen = _best(seeds, rewards, keep)
    rollouts = engine.rollout(prompt, init_seed=chosen, sde_seed=chosen, num_inference_steps=_STEPS, **_FULL)
    return _found(engine, prompt, rewards, chosen, rollouts, before)


def stop_early(engine: Engine, prompt: str, seeds: Sequence[int], keep: int) -> Found:
    """Scouts that are the first steps of the full run; the chosen states go on with the noise that they would have had."""
    before = engine.scheduler.load().steps
    scouts = engine.rollout(prompt, seeds=seeds, num_inference_steps=_STEPS, stop_step=_SCOUT_STEPS, debug_mode=True, **_FULL)
    rewards = [_preview(engine, scout, prompt) for scout in scouts]
    chosen = _best(seeds, rewards, keep)
    kept = [scout.latents for seed, scout in zip(seeds, scouts, strict=True) if seed in chosen]
    states = torch.stack([latents for latents in kept if latents is not None])
    rollouts = engine.rollout(
        prompt, sde_seed=chosen, latents=states, start_step=_SCOUT_STEPS, num_inference_steps=_STEPS, **_FULL
    )
    return _found(engine, prompt, rewards, chosen, rollouts, before)


# What a trainer replays. The debug tensors of scouts have the velocity from which their pictures are predicted.
_FULL: dict[str, Any] = {"sde_type": "sde", "return_denoising_env": True, "return_dit_trajectory": True}


def _preview(engine: Engine, scout: Rollout, prompt: str) -> float:
    """Rates the clean picture x - sigma v that the last step of a stopped run predicted."""
    assert scout.debug_tensors is not None and scout.dit_trajectory is not None
    last = scout.sampling.steps_run[-1]
    sigma = scout.dit_trajectory.sigmas[last]
    clean = scout.dit_trajectory.latents[-2].to(torch.float32) - sigma * scout.debug_tensors.model_output[last]
    return reward(engine.decode(clean, height=scout.sampling.height, width=scout.sampling.width), prompt)


def _reward(rollout: Rollout, prompt: str) -> float:
    assert isinstance(rollout.image, torch.Tensor)
    return reward(rollout.image, prompt)


def _best(seeds: Sequence[int], rewards: Sequence[float], keep: int) -> tuple[int, ...]:
    ranked = sorted(zip(rewards, seeds, strict=True), reverse=True)
    return tuple(sorted(seed for _, seed in ranked[:keep]))


def _found(
    engine: Engine, prompt: str, scouted: Sequence[float], chosen: tuple[int, ...], rollouts: Sequence[Rollout], before: int
) -> Found:
    return Found(
        scouted=tuple(scouted),
        chosen=chosen,
        rollouts=tuple(rollouts),
        rewards=tuple(_reward(rollout, prompt) for rollout in rollouts),
        steps=engine.scheduler.load().steps - before,
    )


if __name__ == "__main__":
    main()
