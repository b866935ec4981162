"""Knows which samples may start, which take steps and which are being decoded. Only the loop uses it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Sequence

from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.sample import Sample
from flowroll.engine.scheduler.policy import BatchLimits, OomBackoff, RoundRobin, is_out_of_memory
from flowroll.engine.scheduler.request import Request, RequestSample, RunningSample

_log = logging.getLogger(__name__)


class RunningSamples:
    """Holds the samples of all requests whose prompts are encoded.

    Args:
        limits: The limits of what runs at the same time.

    Attributes:
        num_in_memory: The number of samples between their initial noise and their picture.
        pixels_in_memory: The number of pixels of these samples together.
        num_decoding: The number of samples in the decode stage.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._ready: deque[RequestSample] = deque()
        self._lanes: RoundRobin[RunningSample] = RoundRobin()
        self._num_made = 0
        self.num_in_memory = self.pixels_in_memory = self.num_decoding = 0
        self._backoff = OomBackoff()

    def has_room(self, pixels: int) -> bool:
        """Returns whether a sample with this number of pixels may start once those that wait have started."""
        return self._limits.admits(
            pixels=pixels,
            num_running=self.num_in_memory + len(self._ready),
            running_pixels=self.pixels_in_memory + sum(sample.request.pixels for sample in self._ready),
        )

    def add_ready(self, request: Request) -> None:
        """Adds the samples of a request to those that wait to start; they start in the order in which they were added."""
        for planned in request.plan.samples:
            self._num_made += 1
            sample = RequestSample(id=self._num_made, request=request, attempt=request.attempt, planned=planned)
            self._ready.append(sample)

    def fork(self, parent: RunningSample) -> None:
        """Replaces a sample at a fork by its children, which wait to start.

        They stand before the samples that start later than their parent: those of their own request, and of later ones. So the
        states that wait for children do not pile up. Such a state is not among the samples in memory, but a part of each child
        that starts.
        """
        request = parent.of.request
        self._lanes.remove(parent.key, parent)
        self._leave_memory(request)
        place = next((at for at, waiting in enumerate(self._ready) if waiting.request.id >= request.id), len(self._ready))
        for number, planned in enumerate(parent.of.planned.children(request.plan.forks)):
            self._num_made += 1
            child = RequestSample(id=self._num_made, request=request, attempt=request.attempt, planned=planned, parent=parent)
            self._ready.insert(place + number, child)

    def next_start(self) -> RequestSample | None:
        """Removes and returns the first waiting sample; None if there is none, or the limits do not admit it now.

        A later sample never overtakes the first one.
        """
        if not self._ready:
            return None
        pixels = self._ready[0].request.pixels
        if not self._limits.admits(pixels=pixels, num_running=self.num_in_memory, running_pixels=self.pixels_in_memory):
            return None
        return self._ready.popleft()

    def run(self, sample: RunningSample) -> None:
        """Adds a started sample to those that take steps."""
        self.num_in_memory += 1
        self.pixels_in_memory += sample.of.request.pixels
        self._lanes.add(sample.key, sample)

    def next_batch(self) -> tuple[Hashable, list[RunningSample]]:
        """Returns the samples that take the next step together, and their batch key."""
        return self._lanes.next(self._most)

    def next_with_room(self) -> RunningSample | None:
        """Returns the oldest of the samples that take the next step, if more could take it with them; None otherwise."""
        key, batch = self._lanes.peek(self._most)
        return batch[0] if batch and len(batch) < self._most(key) else None

    def _most(self, key: Hashable) -> int:
        """Returns how many samples with this batch key may share a forward."""
        return self._backoff.most(key, self._limits.max_batch_samples)

    def step(self, runner: Executor, key: Hashable, batch: Sequence[RunningSample]) -> dict[int, Sample | BaseException]:
        """Takes one step of a batch; returns, by id, the finished and the forked samples and the errors of the failed ones.

        A forward that fails with several samples is repeated in halves, so that only samples that fail by themselves are lost.
        """
        try:
            outcome = runner.step([running.of.id for running in batch])
            self._backoff.went_well(key, len(batch))
            return {**outcome.finished, **outcome.forked, **outcome.failures}
        except BaseException as error:
            if len(batch) == 1:
                return {batch[0].of.id: error}
            if is_out_of_memory(error):
                self._backoff.ran_out(key, len(batch))
            ids = sorted({running.of.request.plan.request_id for running in batch})
            text = "a forward of %d samples failed (%s); taking it again in halves"
            _log.warning(text, len(batch), type(error).__name__, extra={"request_ids": ids})
        # After the handler, where the tensors of the failed forward are no longer referenced.
        runner.free_memory()
        half = -(-len(batch) // 2)
        return {**self.step(runner, key, batch[:half]), **self.step(runner, key, batch[half:])}

    def begin_decoding(self, sample: RunningSample) -> None:
        """Moves a sample that took its last step from those that take steps to those that are decoded. It stays in memory."""
        self._lanes.remove(sample.key, sample)
        self.num_decoding += 1

    def end_decoding(self, request: Request) -> None:
        """Notes that a sample of the request has left the decode stage, and with it the memory."""
        self.num_decoding -= 1
        self._leave_memory(request)

    def drop(self, request: Request) -> None:
        """Removes the request's waiting and running samples. Those that are being decoded leave with `end_decoding`."""
        self._ready = deque(sample for sample in self._ready if sample.request is not request)
        for sample in [sample for sample in self._lanes if sample.of.request is request]:
            self._lanes.remove(sample.key, sample)
            self._leave_memory(request)

    def _leave_memory(self, request: Request) -> None:
        self.num_in_memory -= 1
        self.pixels_in_memory -= request.pixels
