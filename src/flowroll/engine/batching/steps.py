"""One shared step: a forward for all samples of a batch, then each sample's own step function.

Owns what an error costs: an exception in a sample's own step is that sample's. A forward that fails with several samples in it
is taken again in halves, so that only those that fail alone are lost; one that ran out of memory is for a while not tried at
that size again. With several ranks every sample is a batch of its own, and an error that the other ranks do not share ends the
replica.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from flowroll.engine.batching.jobs import RunningSample
from flowroll.engine.batching.room import Room, is_out_of_memory
from flowroll.engine.plan import RequestPlan
from flowroll.errors import EngineError
from flowroll.types import DenoisingEnv

_log = logging.getLogger(__name__)


@runtime_checkable
class Leader(Protocol):
    """What rank 0 tells the other ranks before it acts; see `Replica`."""

    def begin(self, plan: RequestPlan, env: DenoisingEnv) -> None:
        """The samples that follow are this request's."""

    def start_sample(self, seed: int) -> None:
        """A sample's steps follow."""

    def goes_on(self, stop: bool) -> bool:
        """Whether the next step is taken."""

    def finish_sample(self, latents: Tensor) -> None:
        """The sample had its last step."""

    def in_step(self) -> AbstractContextManager[None]:
        """Around what all ranks do at the same time."""


class Steps:
    """The steps of an engine of one rank.

    Attributes:
        can_freeze: Whether a sample may stay between two steps for as long as it likes.
        room: How many samples of a key fit into a forward.
    """

    can_freeze: ClassVar[bool] = True

    def __init__(self) -> None:
        self.room = Room()

    def take_step(self, batch: Sequence[RunningSample]) -> dict[RunningSample, BaseException]:
        """Advances every sample of the batch by a step; returns those that could not be, with the reason."""
        failures: dict[RunningSample, BaseException] = {}
        for sample, velocity in self._velocities(batch, failures):
            try:
                sample.take_step(sample.task, sample.sample, velocity)
            except BaseException as error:
                failures[sample] = error
        return failures

    def stop(self, sample: RunningSample) -> None:
        """A sample that has begun takes no more steps."""

    def _velocities(
        self, batch: Sequence[RunningSample], failures: dict[RunningSample, BaseException]
    ) -> list[tuple[RunningSample, Tensor]]:
        try:
            velocities = forward(batch)
            self.room.went_well(batch[0].key, len(batch))
            return list(zip(batch, velocities, strict=True))
        except BaseException as error:
            if len(batch) == 1:
                failures[batch[0]] = error
                return []
            if is_out_of_memory(error):
                self.room.ran_out(batch[0].key, len(batch))
            shared = {"request_ids": sorted({sample.job.plan.request_id for sample in batch})}
            message = "a forward of %d samples failed (%s); taking it again in halves"
            _log.warning(message, len(batch), type(error).__name__, extra=shared)
        # After the handler, so that the failed forward's tensors are free.
        if batch[0].task.model.device.type == "cuda":
            torch.cuda.empty_cache()
        half = -(-len(batch) // 2)
        return [*self._velocities(batch[:half], failures), *self._velocities(batch[half:], failures)]


class LedSteps(Steps):
    """The steps of a replica of several ranks: one sample at a time, every rank at the same one.

    Args:
        leader: Speaks to the other ranks.
    """

    # The others wait for the next step in a collective.
    can_freeze: ClassVar[bool] = False

    def __init__(self, leader: Leader) -> None:
        super().__init__()
        self._leader = leader
        self._announced: tuple[int, int] | None = None

    @override
    def take_step(self, batch: Sequence[RunningSample]) -> dict[RunningSample, BaseException]:
        (sample,) = batch
        try:
            with self._leader.in_step():
                if sample.sample.step == 0:
                    self._announce(sample)
                assert self._leader.goes_on(False)
                (velocity,) = forward(batch)
                sample.take_step(sample.task, sample.sample, velocity)
            if sample.is_denoised:
                self._leader.finish_sample(sample.sample.latents)
        except BaseException as error:
            return {sample: error}
        return {}

    @override
    def stop(self, sample: RunningSample) -> None:
        if sample.sample.step > 0 and not sample.is_denoised:
            with self._leader.in_step():
                self._leader.goes_on(True)

    def _announce(self, sample: RunningSample) -> None:
        request = sample.job.number, sample.attempt
        if self._announced != request:
            self._leader.begin(sample.task.plan, sample.task.env)
            self._announced = request
        self._leader.start_sample(sample.sample.seed)


def forward(batch: Sequence[RunningSample]) -> list[Tensor]:
    """The velocities of samples with equal keys."""
    model = batch[0].task.model
    inputs = [sample.task.next_input(sample.sample) for sample in batch]
    return model.strategy.velocities(batch[0].task.transformer, inputs)


def engine_error(error: BaseException) -> EngineError:
    """What the caller may know of an unexpected failure: its kind and first line, no traceback, which holds tensors."""
    reason = str(error).strip().splitlines()
    shown = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
    return EngineError(f"the engine must run the request to its end, got {shown}; see the log for the request id.")
