"""The samples in memory: which may start, which run, which are being decoded. Its owner's lock guards it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from flowroll.engine import denoising
from flowroll.engine.batching.jobs import Job, RunningSample
from flowroll.engine.batching.limits import BatchLimits
from flowroll.engine.batching.room import Room
from flowroll.engine.batching.turns import Turns
from flowroll.engine.denoising import DenoisingTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A sample that may start.

    Attributes:
        job: It belongs to.
        attempt: Of the job, when its conditioning was made.
        index: Its place in the order of the seeds.
    """

    job: Job
    attempt: int
    index: int

    @property
    def is_wanted(self) -> bool:
        """Whether its job still is at that attempt."""
        return self.attempt == self.job.attempt

    def begin(self, task: DenoisingTask, now_s: float) -> RunningSample:
        """The sample at its initial noise."""
        sample = denoising.start(task, self.job.plan.seeds[self.index])
        batch_key = task.model.strategy.batch_key(task.next_input(sample))
        return RunningSample(
            job=self.job,
            attempt=self.attempt,
            index=self.index,
            task=task,
            sample=sample,
            take_step=denoising.step_function(sample),
            # A forward runs with one number of CPU threads and one adapter, each of which has a transformer of its own.
            key=(self.job.num_threads, id(task.transformer), batch_key),
            started_s=now_s,
        )


class Samples:
    """Every sample whose request has its conditioning.

    Args:
        limits: How much runs at once.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._ready: deque[Start] = deque()
        self._turns: Turns[RunningSample] = Turns()
        # Started and not finished; those that are being decoded hold their memory too.
        self._num_in_memory = 0
        self._pixels_in_memory = 0

    @property
    def num_ready(self) -> int:
        """Samples that wait for a place."""
        return len(self._ready)

    @property
    def num_in_memory(self) -> int:
        """Samples between their initial noise and their picture."""
        return self._num_in_memory

    @property
    def running_pixels(self) -> int:
        """Of these, together."""
        return self._pixels_in_memory

    @property
    def num_stepping(self) -> int:
        """Samples that have steps to take."""
        return len(self._turns)

    def add_ready(self, job: Job) -> None:
        """Lets a request's samples start as there is room, in the order of acceptance."""
        seeds = job.plan.seeds
        self._ready.extend(Start(job=job, attempt=job.attempt, index=index) for index in range(len(seeds)))

    def next_starts(self) -> list[Start]:
        """The samples that there is room for; they count from now on. The first in line is never overtaken."""
        starts: list[Start] = []
        while self._ready:
            pixels = self._ready[0].job.pixels
            if not self._limits.admits(pixels=pixels, num_running=self._num_in_memory, running_pixels=self._pixels_in_memory):
                break
            self._num_in_memory += 1
            self._pixels_in_memory += pixels
            starts.append(self._ready.popleft())
        return starts

    def run(self, sample: RunningSample) -> None:
        """Gives it a place in the turns."""
        self._turns.add(sample.key, sample)

    def next_batch(self, room: Room) -> list[RunningSample]:
        """The samples that take the next step together."""
        return self._turns.next(lambda key: room.most(key, self._limits.max_batch_samples))

    def rest(self, sample: RunningSample) -> None:
        """Takes it out of the turns; it stays in memory."""
        self._turns.remove(sample.key, sample)

    def release(self, job: Job) -> None:
        """A sample of the job left memory."""
        self._num_in_memory -= 1
        self._pixels_in_memory -= job.pixels

    def drop(self, job: Job) -> list[RunningSample]:
        """Takes out what the job has here, and returns what was running; what is being decoded is released by its stage."""
        self._ready = deque(start for start in self._ready if start.job is not job)
        dropped = [sample for sample in self._turns if sample.job is job]
        for sample in dropped:
            self._turns.remove(sample.key, sample)
            self.release(job)
        return dropped
