"""Re-runs recorded steps and scores them, with gradients.

A forward's bits depend on what else is in its batch: docs/exactness.md has the measurements. By default every (sample, step)
pair is run in forwards of its own, and a micro-batch bounds memory alone. `merge` says whether the pairs of a micro-batch share
forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.families import StepScore, Transformer
from flowroll.replay.precision import noticed_autocast, warn_of_autocast
from flowroll.replay.sources import (
    Place,
    Source,
    check_autocast,
    check_kernels,
    check_noticed_autocast,
    check_weights,
    fast_parts_of,
    pairs_of,
    place_of,
    sources_of,
    steps_of,
)
from flowroll.replay.steps import Pair, Prepared, check_merge, prepare, run_pairs, warn_of_batches
from flowroll.replay.trees import shared_forwards
from flowroll.types import Exactness, PolicyRecord, Rollout
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

    @property
    def ratio_error(self) -> float:
        """Largest |ratio - 1|: 0 where every log-prob has the recorded bits."""
        return (torch.exp(self.log_probs.detach() - self.old_log_probs) - 1).abs().max().item()


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
        policy: The server's policy that did; None: its default, or the caller's transformer.
        exactness: "fast" for a server that is not exact, or where `merge` was.
    """

    steps: tuple[int, ...]
    log_probs: Float[Tensor, " samples steps"]
    stds: Float[Tensor, " samples steps"]
    # The samples' sizes may differ.
    means: tuple[Float[Tensor, " steps *_"], ...]
    velocities: tuple[Float[Tensor, " steps *_"], ...]
    weight_version: str | None = None
    policy: PolicyRecord | None = None
    exactness: Exactness = "exact"


def micro_batches(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    *,
    steps: Integers | None = None,
    micro_batch: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: str = "refuse",
    merge: str = "alone",
) -> Iterator[MicroBatch]:
    """Scores the stochastic steps of rollouts a few at a time: call `backward` on each and its graph is freed.

    Multiply a mean over the pairs of a micro-batch by its `weight`, or the gradient depends on how the pairs were divided.

    Args:
        transformer: The policy: any callable with the diffusers class's signature (plain, FSDP-wrapped, with LoRA).
        rollouts: The rollouts of one or several requests, with env and trajectory; sizes and prompts may be mixed.
        steps: Which steps, 0-based; None: all. Deterministic ones have no density and are left out.
        micro_batch: Pairs per micro-batch, at least 1. Leaves of one tree count once at the steps before and at their fork,
            which are run once.
        device: The device of the transformer; None: that of its first weight.
        dtype: The dtype of its inputs; None: as each rollout records, which must be the dtype that the weights have in the
            forward: their own, or that of FSDP's mixed precision.
        autocast: "refuse": a call under `torch.autocast` is an error, since it runs other kernels than the engine. "measure":
            it runs, and a warning says how far from 1 the first ratios are.
        merge: "alone": every pair has forwards of its own. "exact": the pairs of a micro-batch share forwards in the way in
            which the engine's samples do, where their shapes agree; the log-probs are those of "alone" bit for bit, gradients
            differ in their last bits. Where the engine runs samples alone (on GPUs), and where weights are sharded, this does
            too. "fast": they share ordinary batches, and a warning says how far from 1 the first ratios are. The rollouts of
            a fast engine (`provenance.exactness`) are replayed with "fast" alone.

    Returns:
        Micro-batches, sample by sample and step by step; a pair that shares a forward comes with the first one that does. All
        rollouts are checked before the first forward.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    work = _plan(transformer, rollouts, steps, micro_batch, device, dtype, autocast, merge, stochastic_only=True)
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
    merge: str = "alone",
) -> Float[Tensor, " samples steps"]:
    """Recomputes log-probs of recorded steps under the transformer as it is now: before the first update, the recorded bits.

    Args:
        transformer: The policy: any callable with the diffusers class's signature (plain, FSDP-wrapped, with LoRA).
        rollouts: The rollouts of one or several requests, with env and trajectory; sizes and prompts may be mixed.
        steps: Which steps, 0-based; None: all, for rollouts of one length.
        micro_batch: Pairs that are run together, at least 1. In gradient mode the graphs of all pairs are kept:
            `micro_batches` bounds those.
        device: The device of the transformer; None: that of its first weight.
        dtype: The dtype of its inputs; None: as each rollout records, which must be the dtype that the weights have in the
            forward: their own, or that of FSDP's mixed precision.
        autocast: "refuse": a call under `torch.autocast` is an error, since it runs other kernels than the engine. "measure":
            it runs, and a warning says how far from 1 the first ratios are.
        merge: How the pairs of a micro-batch share forwards; see `micro_batches`.

    Returns:
        float32 on the device, differentiable in the transformer's weights. Exactly 0 at deterministic steps, for which no
        forward is run.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    work = _plan(transformer, rollouts, steps, micro_batch, device, dtype, autocast, merge, stochastic_only=True)
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
    merge: str = "alone",
) -> Scores:
    """Recomputes log-prob, mean, std and velocity of recorded steps, deterministic ones included; see `log_prob`.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    work = _plan(transformer, rollouts, steps, micro_batch, device, dtype, autocast, merge, stochastic_only=False)
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
        exactness="fast" if merge == "fast" else "exact",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a call is about, checked: no forward has been run yet."""

    place: Place
    sources: tuple[Source, ...]
    steps: tuple[int, ...]
    forwards: tuple[tuple[Pair, ...], ...]
    num_pairs: int
    micro_batch: int
    merge: str


def _plan(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    steps: Integers | None,
    micro_batch: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    autocast: str,
    merge: str,
    *,
    stochastic_only: bool,
) -> _Work:
    _check_micro_batch(micro_batch)
    check_merge(merge)
    check_weights(transformer)
    check_kernels(transformer, rollouts, merge)
    place = place_of(transformer, rollouts, device, dtype, autocast)
    sources = sources_of(rollouts, place)
    chosen = steps_of(sources, steps)
    pairs = list(pairs_of(sources, chosen, stochastic_only=stochastic_only))
    forwards = tuple(map(tuple, shared_forwards(pairs)))
    return _Work(
        place=place,
        sources=tuple(sources),
        steps=chosen,
        forwards=forwards,
        num_pairs=len(pairs),
        micro_batch=micro_batch,
        merge=merge,
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
            warn_of_autocast(dtypes, batch.ratio_error)
        if work.merge == "fast" and not start:
            parts = sorted({part for source in work.sources for part in fast_parts_of(source.rollout)})
            if parts or work.sources[0].family.shares_forwards:
                warn_of_batches(batch.ratio_error, parts)
        yield batch


def _micro_batch(transformer: Transformer, work: _Work, forwards: Sequence[Sequence[Pair]]) -> MicroBatch:
    place = work.place
    known: dict[int, Prepared] = {}
    for (source, _), *_ in forwards:
        if source.index not in known:
            known[source.index] = prepare(source, place)
    scores = run_pairs(transformer, forwards, place, known, work.merge)
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


def _check_micro_batch(micro_batch: int) -> None:
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool) or micro_batch < 1:
        raise InvalidRequestError(
            f"micro_batch must be an integer >= 1, got {micro_batch!r}; use 1 for the least memory.", field="micro_batch"
        )
