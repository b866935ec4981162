"""The samples in memory: which may start, which take steps, which are being decoded. Belongs to the loop."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Sequence

from flowroll.engine.runner.sample import Sample
from flowroll.engine.scheduler.policy import BatchLimits, OomBackoff, RoundRobin, is_out_of_memory
from flowroll.engine.scheduler.request import Request, RequestSample, RunningSample
from flowroll.engine.scheduler.runner import Runner

_log = logging.getLogger(__name__)


class RunningSamples:
    """The samples of all requests that have their conditioning.

    Args:
        limits: How much runs at once.

    Attributes:
        num_in_memory: Samples between their initial noise and their picture.
        pixels_in_memory: Pixels of these samples together.
        num_decoding: Samples in the decode stage.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._ready: deque[RequestSample] = deque()
        self._lanes: RoundRobin[RunningSample] = RoundRobin()
        self._num_made = 0
        self.num_in_memory = self.pixels_in_memory = self.num_decoding = 0
        self._backoff = OomBackoff()

    @property
    def num_ready(self) -> int:
        """How many samples wait for a place."""
        return len(self._ready)

    def add_ready(self, request: Request) -> None:
        """Lets the samples of a request start as there is room, in the order of acceptance."""
        for index in range(len(request.plan.seeds)):
            self._num_made += 1
            sample = RequestSample(id=self._num_made, request=request, attempt=request.attempt, index=index)
            self._ready.append(sample)

    def next_start(self) -> RequestSample | None:
        """Takes the sample that may start now; the first in line is never overtaken. None: there is no room."""
        if not self._ready:
            return None
        pixels = self._ready[0].request.pixels
        if not self._limits.admits(pixels=pixels, num_running=self.num_in_memory, running_pixels=self.pixels_in_memory):
            return None
        return self._ready.popleft()

    def run(self, sample: RunningSample) -> None:
        """Gives a started sample its place among those that take steps."""
        self.num_in_memory += 1
        self.pixels_in_memory += sample.of.request.pixels
        self._lanes.add(sample.key, sample)

    def next_batch(self) -> tuple[Hashable, list[RunningSample]]:
        """Returns the samples that take the next step together, and their key."""
        return self._lanes.next(lambda key: self._backoff.most(key, self._limits.max_batch_samples))

    def step(self, runner: Runner, key: Hashable, batch: Sequence[RunningSample]) -> dict[int, Sample | BaseException]:
        """Takes one step of a batch, and returns what became of the samples that need no further step, by id.

        A forward that fails with several samples is taken again in halves, so that only those that fail alone are lost.
        """
        try:
            outcome = runner.step([running.of.id for running in batch])
            self._backoff.went_well(key, len(batch))
            return {**outcome.finished, **outcome.failures}
        except BaseException as error:
            if len(batch) == 1:
                return {batch[0].of.id: error}
            if is_out_of_memory(error):
                self._backoff.ran_out(key, len(batch))
            ids = sorted({running.of.request.plan.request_id for running in batch})
            text = "a forward of %d samples failed (%s); taking it again in halves"
            _log.warning(text, len(batch), type(error).__name__, extra={"request_ids": ids})
        # After the handler, so that the failed forward's tensors are free.
        runner.free_memory()
        half = -(-len(batch) // 2)
        return {**self.step(runner, key, batch[:half]), **self.step(runner, key, batch[half:])}

    def begin_decoding(self, sample: RunningSample) -> None:
        """Takes a sample that had its last step out of the lanes; it stays in memory."""
        self._lanes.remove(sample.key, sample)
        self.num_decoding += 1

    def end_decoding(self, request: Request) -> None:
        """Notes that a sample of the request left the decode stage, and memory."""
        self.num_decoding -= 1
        self._leave_memory(request)

    def drop(self, request: Request) -> None:
        """Takes out what the request has here; what is being decoded leaves with `end_decoding`."""
        self._ready = deque(sample for sample in self._ready if sample.request is not request)
        for sample in [sample for sample in self._lanes if sample.of.request is request]:
            self._lanes.remove(sample.key, sample)
            self._leave_memory(request)

    def _leave_memory(self, request: Request) -> None:
        self.num_in_memory -= 1
        self.pixels_in_memory -= request.pixels
