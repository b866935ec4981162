"""Holds every accepted request until its end: a request waits, runs, and ends exactly once. Only the loop uses it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from flowroll.engine.scheduler.counters import Counters, RequestCounts
from flowroll.engine.scheduler.request import Request, cancelled, end_future, engine_error, too_late
from flowroll.errors import FlowrollError

_log = logging.getLogger(__name__)


class RequestQueue:
    """Holds the accepted requests: those that wait and those that run.

    Args:
        clock: Returns the monotonic time in seconds.
        release: Called with a request before it ends or is requeued.
    """

    def __init__(self, clock: Callable[[], float], release: Callable[[Request], None]) -> None:
        self._clock, self._release = clock, release
        self.counters = Counters()
        self._waiting: deque[Request] = deque()
        self._running: dict[Request, None] = {}
        # The requests that have ended, each with its results or its error.
        self._ends: list[tuple[Request, list[Any] | None, FlowrollError | None]] = []
        # Kept, not summed up: the loop asks in every turn, and any number may wait.
        self._waiting_work = self._running_work = 0

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """The number of requests that were admitted and have not ended."""
        return len(self._running)

    @property
    def waiting(self) -> Iterable[Request]:
        """The waiting requests, in the order in which they will be admitted."""
        return self._waiting

    @property
    def first_waiting(self) -> Request | None:
        """The request that will be admitted next; None if none waits."""
        return self._waiting[0] if self._waiting else None

    @property
    def running(self) -> Iterable[Request]:
        """The running requests, in the order in which they were admitted."""
        return self._running.keys()

    @property
    def oldest_waiting_since_s(self) -> float | None:
        """When the first waiting request arrived, in monotonic seconds; None if none waits."""
        return self._waiting[0].accepted_s if self._waiting else None

    @property
    def work_ahead(self) -> float:
        """The amount of work of the requests that wait, and half of those that run, which are anywhere between their ends."""
        return self._waiting_work + self._running_work / 2

    def __iter__(self) -> Iterator[Request]:
        yield from self._running
        yield from self._waiting

    def counts(self) -> RequestCounts:
        """Counts the requests at this moment."""
        return RequestCounts(
            accepted=self.counters.accepted,
            completed=self.counters.completed,
            failed=sum(self.counters.failures.values()),
            pending=len(self._waiting),
            running=len(self._running),
        )

    def accept(self, request: Request) -> None:
        """Adds a new request at the end of the queue."""
        self.counters.accepted += 1
        self._waiting.append(request)
        self._waiting_work += request.work

    def admit(self, policy: str | None, *, may_exchange: bool) -> Request | None:
        """Admits the first waiting request, which runs from now on, and returns it; None if none may run.

        Args:
            policy: The policy whose weights are in place.
            may_exchange: Whether a request of another policy may be admitted.
        """
        while self._waiting:
            request = self._waiting[0]
            if request.plan.held_policy != policy and not may_exchange:
                return None
            is_wanted = request.has_begun or request.future.set_running_or_notify_cancel()
            request.has_begun = True
            if not is_wanted:
                self.fail(request, cancelled())
                continue
            self._waiting.popleft()
            request.admitted_s = self._clock()
            self._running[request] = None
            self._waiting_work -= request.work
            self._running_work += request.work
            return request
        return None

    def requeue(self, requests: Sequence[Request]) -> None:
        """Resets running requests and puts them back into the queue, before the requests that wait."""
        self._waiting.extendleft(reversed(requests))
        for request in requests:
            del self._running[request]
            self._waiting_work, self._running_work = self._waiting_work + request.work, self._running_work - request.work
            self._release(request)
            request.restart()

    def complete(self, request: Request) -> None:
        """Ends a request with its results."""
        self._end(request, [request.results[index] for index in range(request.plan.num_answers)])

    def complete_partly(self, request: Request) -> None:
        """Ends a request with the results that it has so far, of which there is at least one."""
        left_out = tuple(index for index in range(request.plan.num_answers) if index not in request.results)
        self._end(request, [replace(request.results[index], left_out=left_out) for index in sorted(request.results)])

    def fail(self, request: Request, error: BaseException) -> None:
        """Ends a request in an error. Unless it is a `FlowrollError`, the caller gets one line of it, and the log all of it."""
        shown = error
        if not isinstance(shown, FlowrollError):
            shown = engine_error(error)
            _log.error("the request failed in the engine", exc_info=error, extra={"request_id": request.plan.request_id})
        # The frames of the traceback hold tensors, and they refer back to the error.
        error.__traceback__ = None
        self._end(request, error=shown)

    def expire(self) -> None:
        """Ends the requests whose deadline has passed, and those whose future was cancelled while they waited."""
        now_s = self._clock()
        for request in list(self):
            if request.deadline_s is not None and now_s >= request.deadline_s:
                self.fail(request, too_late(now_s - request.accepted_s))
            elif not request.has_begun and request.future.cancelled():
                self.fail(request, cancelled())

    def next_deadline_s(self) -> float | None:
        """Returns the earliest deadline of all requests, in monotonic seconds; None if no request has one."""
        return min((request.deadline_s for request in self if request.deadline_s is not None), default=None)

    def deliver_ends(self) -> None:
        """Ends the futures of the requests that have ended. The futures' callbacks run in this call."""
        ends, self._ends = self._ends, []
        for request, results, error in ends:
            if request.has_begun or request.future.set_running_or_notify_cancel():
                end_future(request.future, results, error=error)

    def _end(self, request: Request, results: list[Any] | None = None, *, error: FlowrollError | None = None) -> None:
        if request in self._running:
            del self._running[request]
            self._running_work -= request.work
        else:
            self._waiting.remove(request)
            self._waiting_work -= request.work
        self._release(request)
        request.future.spans = request.spans(self._clock())
        self.counters.note_end(request.future.timing, None if error is None else error.code)
        # A new attempt, so that results of work that is still under way for the request are dropped.
        request.restart()
        self._ends.append((request, results, error))
