"""Runs recorded steps again: each in forwards of its own, or several of them in one forward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from flowroll.errors import InvalidRequestError
from flowroll.exact import Alone, PlainBatch, Strategy, choose_strategy, is_compiled
from flowroll.families import Family, ForwardInput, StepInput, StepScore, Transformer
from flowroll.replay.precision import is_sharded
from flowroll.replay.sources import Place, Source
from flowroll.types import DenoisingEnv

# A recorded step of a sample.
Pair: TypeAlias = tuple[Source, int]

# How the pairs of a micro-batch are run.
_CHOICES = ("alone", "exact", "fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the steps of a sample share while the weights stay as they are.

    Attributes:
        env: Its environment on the device.
        fixed: What the forwards of all its steps take, and what the first ones leave for later ones.
    """

    env: DenoisingEnv
    fixed: Sequence[ForwardInput]


def prepare(source: Source, place: Place) -> Prepared:
    """Returns what the steps of a sample share while the weights stay as they are."""
    env = source.env_on(place)
    return Prepared(env=env, fixed=source.recipe.fixed_inputs(env))


def run_pair(transformer: Transformer, source: Source, step: int, place: Place, shared: Prepared | None = None) -> StepScore:
    """Scores one recorded step of one sample; `shared` is what `prepare` returned for it, for the same weights."""
    known = {source.index: shared or prepare(source, place)}
    (found,) = run_pairs(transformer, [[(source, step)]], place, known, "alone")
    return found


def run_pairs(
    transformer: Transformer, groups: Sequence[Sequence[Pair]], place: Place, known: Mapping[int, Prepared], merge: str
) -> list[StepScore]:
    """Scores recorded steps.

    Args:
        transformer: The policy.
        groups: The pairs; those of one group came out of one forward, which is run once.
        place: Where the transformer runs.
        known: What `prepare` returned for each sample, by its index.
        merge: One of the names that `check_merge` accepts.

    Returns:
        The scores, group by group.
    """
    by_dtype: dict[torch.dtype, list[StepInput]] = {}
    for pairs in groups:
        source, step = pairs[0]
        by_dtype.setdefault(source.recipe.dtype, []).extend(
            _step_input(source, state, place, known[source.index]) for state in _states_run(source, step)
        )
    family = groups[0][0][0].family
    found = {
        dtype: iter(strategy_for(merge, transformer, family, place.device, dtype).velocities(transformer, inputs))
        for dtype, inputs in by_dtype.items()
    }
    scores = []
    for pairs in groups:
        source, step = pairs[0]
        velocities = {state: next(found[source.recipe.dtype]) for state in _states_run(source, step)}
        scores += _scores(pairs, velocities, place)
    return scores


def strategy_for(merge: str, transformer: Transformer, family: Family, device: torch.device, dtype: torch.dtype) -> Strategy:
    """Returns what runs the forwards of several pairs."""
    if merge == "fast" and family.shares_forwards:
        return PlainBatch(family, dtype)
    # Ranks that hold a part of the weights each wait for the others in every forward, so that all must run as many. How many
    # shared ones there are depends on each rank's own samples. And no function mode may be active in a compiled block.
    if merge == "exact" and not (isinstance(transformer, nn.Module) and (is_sharded(transformer) or is_compiled(transformer))):
        return _exact(family, device, dtype)
    return Alone(family, dtype)


def check_merge(merge: object) -> None:
    """Refuses what is no way of running the pairs of a micro-batch.

    Raises:
        InvalidRequestError: It is none of the three.
    """
    if merge not in _CHOICES:
        raise InvalidRequestError(f"merge must be one of {', '.join(_CHOICES)}, got {merge!r}; choose one.", field="merge")


def warn_of_batches(ratio_error: float, fast_parts: Sequence[str]) -> None:
    """Says how far ordinary batches, here or in the engine that made the rollouts, take the ratio from 1, and why."""
    engine = f" And the engine that made the rollouts was fast itself ({', '.join(fast_parts)})." if fast_parts else ""
    warnings.warn(
        'merge="fast" runs several samples in one batch, whose kernels may sum in another order than those of the engine\'s '
        f"rollout, so that the ratio need not be 1 before any update.{engine} In this call's first micro-batch it is up to "
        f"{ratio_error:.3g} off.",
        stacklevel=4,
    )


@lru_cache(maxsize=64)
def _exact(family: Family, device: torch.device, dtype: torch.dtype) -> Strategy:
    """Returns the engine's strategy; one is kept, so that a kind of forward is analyzed once for each transformer."""
    return choose_strategy(family, device=device, dtype=dtype)


def _states_run(source: Source, step: int) -> list[int]:
    """Returns the states at which a forward is run to score a step, in their order."""
    return source.states_of(step)[:-1]


def _step_input(source: Source, state: int, place: Place, prepared: Prepared) -> StepInput:
    return source.recipe.step_input(source.state(state, place.device), state, prepared.env, prepared.fixed)


def _scores(pairs: Sequence[Pair], velocities: Mapping[int, Tensor], place: Place) -> list[StepScore]:
    """Scores a recorded step of several samples that came out of one forward."""
    source, step = pairs[0]
    recipe, latents, previous = source.recipe, source.state(step, place.device), None
    if recipe.transitions[step].needs_previous:
        previous = recipe.clean_prediction(velocities[step - 1], source.state(step - 1, place.device), step - 1)
    return [
        one.recipe.evaluate(velocities[step], latents, one.state(step + 1, place.device), step, previous) for one, _ in pairs
    ]
