"""An accepted request, and the samples it is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from flowroll.engine.batching.ledger import StageName, Stretch, Timing
from flowroll.engine.denoising import DenoisingTask, Sample, StepFunction
from flowroll.engine.finishing import Finished
from flowroll.engine.plan import RequestPlan

T = TypeVar("T")
# The stages between the moments that a job notes.
_BETWEEN: tuple[StageName, ...] = ("queue", "encode", "queue", "denoise", "decode")
# What a finished sample becomes.
Finish = Callable[[RequestPlan, Finished], Any]


class Accepted(Future[list[T]]):
    """The answer to come of an accepted request: one entry per sample, in the order of the seeds.

    `cancel` works while the request waits; `Batcher.cancel` at any time.

    Attributes:
        request_id: Of the request; callers may give several requests the same.
        stretches: Where its time went, in order and without a gap, once it has ended; only the stages that it reached.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id
        self.stretches: tuple[Stretch, ...] = ()

    @property
    def timing(self) -> Timing:
        """Where its time went, by stage."""
        return Timing.of(self.stretches)


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """An accepted request. Whoever takes it out of the batcher's jobs, under the lock, ends its future.

    Attributes:
        number: Place in the order of acceptance.
        plan: The request.
        finish: Makes the answer of a sample.
        future: Its answer.
        accepted_s: When it came.
        deadline_s: When it is given up; None: never.
        num_threads: CPU threads of the caller; they shape the bits, so every thread that works for it uses as many.
        attempt: How many times it was put back to the start; what an earlier attempt left behind is dropped.
        has_begun: Whether its future cannot be cancelled any more.
        task: Its conditioning and schedule, shared by its samples.
        results: By place in the order of the seeds.
        taken_s: When it was taken up.
        encoded_s: When its conditioning was made.
        started_s: When its first sample started.
        denoised_s: When its last sample had its last step.
        num_denoised: Samples that had their last step.
    """

    number: int
    plan: RequestPlan
    finish: Finish
    future: Accepted[Any]
    accepted_s: float
    deadline_s: float | None
    num_threads: int = field(default_factory=torch.get_num_threads)
    attempt: int = 0
    has_begun: bool = False
    task: DenoisingTask | None = None
    results: dict[int, Any] = field(default_factory=dict)
    taken_s: float | None = None
    encoded_s: float | None = None
    started_s: float | None = None
    denoised_s: float | None = None
    num_denoised: int = 0

    @property
    def pixels(self) -> int:
        """Of one sample."""
        return self.plan.geometry.height * self.plan.geometry.width

    @property
    def work(self) -> int:
        """What its time is roughly proportional to: pixels x steps x samples."""
        return self.pixels * self.plan.schedule.num_steps * len(self.plan.seeds)

    def note_denoised(self, now_s: float) -> None:
        """One more sample had its last step."""
        self.num_denoised += 1
        if self.num_denoised == len(self.plan.seeds):
            self.denoised_s = now_s

    def restart(self) -> None:
        """Back to the start, with the same seeds."""
        self.attempt += 1
        self.task = None
        self.results.clear()
        self.taken_s = self.encoded_s = self.started_s = self.denoised_s = None
        self.num_denoised = 0

    def stretches(self, now_s: float) -> tuple[Stretch, ...]:
        """Where its time went if it ends now."""
        moments = (self.accepted_s, self.taken_s, self.encoded_s, self.started_s, self.denoised_s)
        noted = [moment_s for moment_s in moments if moment_s is not None]
        return tuple(
            Stretch(stage=stage, start_s=start_s, end_s=end_s)
            for stage, (start_s, end_s) in zip(_BETWEEN, itertools.pairwise([*noted, now_s]), strict=False)
        )


@dataclass(slots=True, kw_only=True, eq=False)
class RunningSample:
    """One sample of a job, from its initial noise to its picture.

    Attributes:
        job: It belongs to.
        attempt: Of the job, when the sample started.
        index: Its place in the order of the seeds.
        task: Of the job, when the sample started.
        sample: Its state.
        take_step: Its step function, from start to end.
        key: Samples with equal keys may share a forward.
        started_s: When it started.
    """

    job: Job
    attempt: int
    index: int
    task: DenoisingTask
    sample: Sample
    take_step: StepFunction
    key: Hashable
    started_s: float

    @property
    def is_wanted(self) -> bool:
        """Whether its job still is at the attempt that the sample was started for."""
        return self.attempt == self.job.attempt

    @property
    def is_denoised(self) -> bool:
        """Whether it had its last step."""
        return self.sample.step == self.task.plan.schedule.num_steps
