"""Re-runs recorded steps and scores them, with gradients.

Every (sample, step) pair is run in forwards of its own, shaped as the engine's, because a forward's bits depend on what else is
in its batch: docs/architecture.md has the measurements. A micro-batch therefore bounds memory, and changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.families import ForwardInput, StepScore, Transformer
from flowroll.replay.precision import noticed_autocast, warn_of_autocast
from flowroll.replay.sources import (
    Place,
    Source,
    check_autocast,
    check_noticed_autocast,
    check_weights,
    pairs_of,
    place_of,
    sources_of,
    steps_of,
)
from flowroll.replay.trees import shared_forwards
from flowroll.types import DenoisingEnv, Rollout
from flowroll.types.arguments import Integers


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some (sample, step) pairs, scored; everything on the transformer's device.

    Attributes:
        samples: Index of each pair's rollout.
        steps: Step of each pair.
        log_probs: The log-probs by the transformer as it is now; differentiable, float32.
        old_log_probs: The log-probs that the rollouts record, float32.
        scores: Velocity, mean, std and log-prob of each pair.
        weight: The micro-batch's share of all pairs. A loss that is a mean over its pairs, multiplied by this, adds up to the
            gradient of the mean over all, whatever `micro_batch` is.
    """

    samples: tuple[int, ...]
    steps: tuple[int, ...]
    log_probs: Float[Tensor, " pairs"]
    old_log_probs: Float[Tensor, " pairs"]
    scores: tuple[StepScore, ...]
    weight: float

    @property
    def stds(self) -> Float[Tensor, " pairs"]:
        """Total std of each transition, float32."""
        return torch.tensor([score.std for score in self.scores], dtype=torch.float32, device=self.log_probs.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Every asked step of every sample, scored; everything on the transformer's device, or from a server on the CPU.

    Attributes:
        steps: The steps, in the order of the last dimension of the tensors.
        log_probs: Differentiable, float32; 0 at deterministic steps.
        stds: Total std of the transitions, float32; 0 at deterministic steps.
        means: Per sample, mean of the next latents, float32; none if a server was asked for log-probs only.
        velocities: Per sample, the guided velocity given to the transition, float32; as the means.
        weight_version: The version of the server's weights that scored all of it; None where it was the caller's transformer.
    """

    steps: tuple[int, ...]
    log_probs: Float[Tensor, " samples steps"]
    stds: Float[Tensor, " samples steps"]
    # The samples' sizes may differ.
    means: tuple[Float[Tensor, " steps *_"], ...]
    velocities: tuple[Float[Tensor, " steps *_"], ...]
    weight_version: str | None = None


def micro_batches(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    *,
    steps: Integers | None = None,
    micro_batch: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: str = "refuse",
) -> Iterator[MicroBatch]:
    """Scores the stochastic steps of rollouts a few at a time: call `backward` on each and its graph is freed.

    Multiply a mean over the pairs of a micro-batch by its `weight`, or the gradient depends on how the pairs were divided.

    Args:
        transformer: The policy: any callable with the diffusers class's signature (plain, FSDP-wrapped, with LoRA).
        rollouts: The rollouts of one or several requests, with env and trajectory; sizes and prompts may be mixed.
        steps: Which steps, 0-based; None: all. Deterministic ones have no density and are left out.
        micro_batch: Forwards per micro-batch, at least 1. A forward is of one pair; of several, where these are leaves of one
            tree and the step is before or at their fork.
        device: The device of the transformer; None: that of its first weight.
        dtype: The dtype of its inputs; None: as each rollout records, which must be the dtype that the weights have in the
            forward: their own, or that of FSDP's mixed precision.
        autocast: "refuse": a call under `torch.autocast` is an error, since it runs other kernels than the engine. "measure":
            it runs, and a warning says how far from 1 the first ratios are.

    Returns:
        Micro-batches, sample by sample and step by step; a pair that shares a forward comes with the first one that does. All
        rollouts are checked before the first forward.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    work = _plan(transformer, rollouts, steps, micro_batch, device, dtype, autocast, stochastic_only=True)
    return _run(transformer, work)


def log_prob(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    *,
    steps: Integers | None = None,
    micro_batch: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: str = "refuse",
) -> Float[Tensor, " samples steps"]:
    """Recomputes log-probs of recorded steps under the transformer as it is now: before the first update, the recorded bits.

    Args:
        transformer: The policy: any callable with the diffusers class's signature (plain, FSDP-wrapped, with LoRA).
        rollouts: The rollouts of one or several requests, with env and trajectory; sizes and prompts may be mixed.
        steps: Which steps, 0-based; None: all, for rollouts of one length.
        micro_batch: Pairs whose inputs are on the device together, at least 1; it changes no bit. In gradient mode the graphs
            of all pairs are kept: `micro_batches` bounds those.
        device: The device of the transformer; None: that of its first weight.
        dtype: The dtype of its inputs; None: as each rollout records, which must be the dtype that the weights have in the
            forward: their own, or that of FSDP's mixed precision.
        autocast: "refuse": a call under `torch.autocast` is an error, since it runs other kernels than the engine. "measure":
            it runs, and a warning says how far from 1 the first ratios are.

    Returns:
        float32 on the device, differentiable in the transformer's weights. Exactly 0 at deterministic steps, for which no
        forward is run.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    work = _plan(transformer, rollouts, steps, micro_batch, device, dtype, autocast, stochastic_only=True)
    found: dict[tuple[int, int], Tensor] = {}
    for batch in _run(transformer, work):
        found.update(zip(zip(batch.samples, batch.steps, strict=True), batch.log_probs.unbind(), strict=True))
    none = torch.zeros((), dtype=torch.float32, device=work.place.device)
    return torch.stack([torch.stack([found.get((source.index, step), none) for step in work.steps]) for source in work.sources])


def score(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    *,
    steps: Integers | None = None,
    micro_batch: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: str = "refuse",
) -> Scores:
    """Recomputes log-prob, mean, std and velocity of recorded steps, deterministic ones included; see `log_prob`.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    work = _plan(transformer, rollouts, steps, micro_batch, device, dtype, autocast, stochastic_only=False)
    found: dict[tuple[int, int], StepScore] = {}
    for batch in _run(transformer, work):
        found.update(zip(zip(batch.samples, batch.steps, strict=True), batch.scores, strict=True))
    rows = [[found[source.index, step] for step in work.steps] for source in work.sources]
    return Scores(
        steps=work.steps,
        log_probs=torch.stack([torch.stack([one.log_prob for one in row]) for row in rows]),
        stds=torch.tensor([[one.std for one in row] for row in rows], dtype=torch.float32, device=work.place.device),
        means=tuple(torch.stack([one.mean.to(torch.float32) for one in row]) for row in rows),
        velocities=tuple(torch.stack([one.velocity.to(torch.float32) for one in row]) for row in rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the steps of a sample share while the weights stay as they are.

    Attributes:
        env: Its environment on the device.
        fixed: What the forwards of all its steps take, and what the first ones leave for later ones.
    """

    env: DenoisingEnv
    fixed: Sequence[ForwardInput]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a call is about, checked: no forward has been run yet."""

    place: Place
    sources: tuple[Source, ...]
    steps: tuple[int, ...]
    forwards: tuple[tuple[tuple[Source, int], ...], ...]
    num_pairs: int
    micro_batch: int


def _plan(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    steps: Integers | None,
    micro_batch: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    autocast: str,
    *,
    stochastic_only: bool,
) -> _Work:
    _check_micro_batch(micro_batch)
    check_weights(transformer)
    place = place_of(transformer, rollouts, device, dtype, autocast)
    sources = sources_of(rollouts, place)
    chosen = steps_of(sources, steps)
    pairs = list(pairs_of(sources, chosen, stochastic_only=stochastic_only))
    forwards = tuple(map(tuple, shared_forwards(pairs)))
    return _Work(
        place=place, sources=tuple(sources), steps=chosen, forwards=forwards, num_pairs=len(pairs), micro_batch=micro_batch
    )


def _run(transformer: Transformer, work: _Work) -> Iterator[MicroBatch]:
    size, place = work.micro_batch, work.place
    for start in range(0, len(work.forwards), size):
        # Here, because a caller may turn it on between two micro-batches.
        check_autocast(place)
        # A wrapper that turns it on does so at every forward: the first ones are looked into.
        with noticed_autocast(None if start else transformer, place.device) as dtypes:
            batch = _micro_batch(transformer, work, work.forwards[start : start + size])
        check_noticed_autocast(place, dtypes)
        if dtypes:
            warn_of_autocast(dtypes, batch.log_probs, batch.old_log_probs)
        yield batch


def _micro_batch(transformer: Transformer, work: _Work, forwards: Sequence[Sequence[tuple[Source, int]]]) -> MicroBatch:
    place = work.place
    known: dict[int, Prepared] = {}
    scores: list[StepScore] = []
    for pairs in forwards:
        source, _ = pairs[0]
        if source.index not in known:
            known[source.index] = prepare(source, place)
        scores += _run_pairs(transformer, pairs, place, known[source.index])
    chunk = [pair for pairs in forwards for pair in pairs]
    old = [source.rollout.log_probs[step] for source, step in chunk if source.rollout.log_probs is not None]
    return MicroBatch(
        samples=tuple(source.index for source, _ in chunk),
        steps=tuple(step for _, step in chunk),
        log_probs=torch.stack([one.log_prob for one in scores]),
        old_log_probs=torch.stack(old).to(place.device),
        scores=tuple(scores),
        weight=len(chunk) / work.num_pairs,
    )


def prepare(source: Source, place: Place) -> Prepared:
    """Returns what the steps of a sample share while the weights stay as they are."""
    env = source.env_on(place)
    return Prepared(env=env, fixed=source.recipe.fixed_inputs(env))


def run_pair(transformer: Transformer, source: Source, step: int, place: Place, shared: Prepared | None = None) -> StepScore:
    """Scores one recorded step of one sample; `shared` is what `prepare` returned for it, for the same weights."""
    (found,) = _run_pairs(transformer, [(source, step)], place, shared or prepare(source, place))
    return found


def _run_pairs(
    transformer: Transformer, pairs: Sequence[tuple[Source, int]], place: Place, shared: Prepared
) -> list[StepScore]:
    """Scores a recorded step of several samples that came out of one forward, which is run once."""
    source, step = pairs[0]
    latents = source.state(step, place.device)
    before = source.state(step - 1, place.device) if source.recipe.transitions[step].needs_previous else None
    velocity, previous = source.recipe.run(transformer, latents, step, shared.env, before=before, fixed=shared.fixed)
    return [one.recipe.evaluate(velocity, latents, one.state(step + 1, place.device), step, previous) for one, _ in pairs]


def _check_micro_batch(micro_batch: int) -> None:
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool) or micro_batch < 1:
        raise InvalidRequestError(
            f"micro_batch must be an integer >= 1, got {micro_batch!r}; use 1 for the least memory.", field="micro_batch"
        )
