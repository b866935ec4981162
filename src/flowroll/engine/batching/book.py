"""Every accepted request until its end: it waits, it runs, it ends, once.

Its owner's lock guards it. Ends are collected under the lock and carried out after it, since a future runs its callbacks there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flowroll.engine.batching.jobs import Job
from flowroll.engine.batching.ledger import Ledger, WorkerStats
from flowroll.engine.batching.steps import engine_error
from flowroll.errors import CancelledRequestError, DeadlineExceededError, FlowrollError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a request ends: in results, or in an error.

    Attributes:
        job: The request.
        results: In the order of its seeds.
        error: What its caller is told.
        cause: What the log is told, where that is more.
    """

    job: Job
    results: list[Any] | None = None
    error: FlowrollError | None = None
    cause: BaseException | None = None

    def carry_out(self) -> None:
        """Ends the future."""
        future = self.job.future
        if self.cause is not None:
            request = {"request_id": self.job.plan.request_id}
            _log.error("the request failed in the engine", exc_info=self.cause, extra=request)
            # Its frames hold tensors, and, through them, itself.
            self.cause.__traceback__ = None
        if self.job.has_begun:
            if future.cancelled():  # while it waited
                return
        elif not future.set_running_or_notify_cancel():
            return
        if self.error is None:
            future.set_result(self.results or [])
        else:
            future.set_exception(self.error)


class Book:
    """The accepted requests.

    Args:
        clock: Monotonic seconds.
        leave: Called with a request that runs no more, before it ends or is put back.
    """

    def __init__(self, clock: Callable[[], float], leave: Callable[[Job], None]) -> None:
        self._clock, self._leave = clock, leave
        self.ledger = Ledger()
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, None] = {}
        self._ends: list[End] = []

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that were taken up and have not ended."""
        return len(self._running)

    @property
    def running(self) -> Iterable[Job]:
        """The requests that run, in the order in which they were taken up."""
        return self._running.keys()

    def __iter__(self) -> Iterator[Job]:
        yield from self._running
        yield from self._waiting

    def stats(self) -> WorkerStats:
        """The counters."""
        return WorkerStats(
            accepted=self.ledger.accepted,
            completed=self.ledger.completed,
            failed=sum(self.ledger.failures.values()),
            pending=len(self._waiting),
            running=len(self._running),
        )

    def oldest_waiting_s(self) -> float:
        """How long the first in line has waited."""
        return self._clock() - self._waiting[0].accepted_s if self._waiting else 0.0

    def accept(self, job: Job) -> None:
        """Puts a new request in line."""
        self.ledger.accepted += 1
        self._waiting.append(job)

    def take_up(self) -> Job | None:
        """The first in line, which runs from now on; None if none waits."""
        while self._waiting:
            job = self._waiting[0]
            is_wanted = job.has_begun or job.future.set_running_or_notify_cancel()
            job.has_begun = True
            if not is_wanted:
                self.fail(job, cancelled())
                continue
            self._waiting.popleft()
            job.taken_s = self._clock()
            self._running[job] = None
            return job
        return None

    def put_back(self) -> None:
        """Puts everything that runs back to the start, before those that wait."""
        jobs = list(self._running)
        self._running.clear()
        self._waiting.extendleft(reversed(jobs))
        for job in jobs:
            self._leave(job)
            job.restart()

    def complete(self, job: Job) -> None:
        """A request ends in its results."""
        self._end(End(job=job, results=[job.results[index] for index in range(len(job.plan.seeds))]))

    def fail(self, job: Job, error: BaseException) -> None:
        """A request ends in an error; one that is not ours is shown to the caller in a line and to the log in full."""
        if isinstance(error, FlowrollError):
            # Its frames hold tensors, as those of any error that was raised in a step.
            self._end(End(job=job, error=error.with_traceback(None)))
        else:
            self._end(End(job=job, error=engine_error(error), cause=error))

    def sweep(self) -> None:
        """Ends the requests whose deadline has passed, and those whose future was cancelled while they waited."""
        now_s = self._clock()
        for job in list(self):
            if job.deadline_s is not None and now_s >= job.deadline_s:
                self.fail(job, too_late(now_s - job.accepted_s))
            elif not job.has_begun and job.future.cancelled():
                self.fail(job, cancelled())

    def next_deadline_s(self) -> float | None:
        """The first moment at which `sweep` will have something to do; None: no request has a deadline."""
        return min((job.deadline_s for job in self if job.deadline_s is not None), default=None)

    def ends(self) -> list[End]:
        """What is to be carried out once the lock is released."""
        ends, self._ends = self._ends, []
        return ends

    def _end(self, end: End) -> None:
        job = end.job
        if job in self._running:
            del self._running[job]
            self._leave(job)
        else:
            self._waiting.remove(job)
        now_s = self._clock()
        job.future.stretches = job.stretches(now_s)
        self.ledger.note_end(job.future.timing, None if end.error is None else end.error.code)
        # Whatever still works for it is not wanted any more.
        job.restart()
        self._ends.append(end)


def cancelled() -> CancelledRequestError:
    """The error of a request that was aborted, or whose caller went away."""
    return CancelledRequestError("the request must be wanted to run to its end, got its cancellation; send it again.")


def too_late(seconds: float) -> DeadlineExceededError:
    """The error of a request that has not ended after so long, although its deadline was then."""
    return DeadlineExceededError(
        f"the request must end before its deadline, got {seconds:.1f} s without an end; allow more, or ask for less."
    )
