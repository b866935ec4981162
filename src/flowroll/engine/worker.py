"""One thread that runs the engine, behind a bounded queue.

Owns the life of an accepted request: it ends in exactly one result or one error, whatever happens to the engine, to the
requests around it or to the process. It knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, overload

from flowroll.engine.engine import Engine
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scoring import ScorePlan
from flowroll.errors import EngineError, FlowrollError, QueueFullError, RankLostError, ShuttingDownError
from flowroll.types import GeneratedImage, Rollout, ScoreAnswer

RequestKind: TypeAlias = Literal["rollout", "generate", "score"]
Results: TypeAlias = list[Rollout] | list[GeneratedImage] | ScoreAnswer
T = TypeVar("T")

_log = logging.getLogger(__name__)
_RECENT_REQUESTS = 32
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 120.0
# What a thread gets to come back from the collective of a lost rank.
_LOST_S = 3.0
# A request counts as stuck when it has run this many times longer than recent ones of its size, and at least the floor.
_STALL_FACTOR, _STALL_FLOOR_S = 10.0, 60.0
# Before anything was measured there is nothing to compare with: a first, large request on a slow device takes its time.
_STALL_UNKNOWN_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """One consistent look at a worker: accepted = completed + failed + pending + running, always.

    Attributes:
        accepted: Requests taken since the start.
        completed: Of these, ended in a result.
        failed: Of these, ended in an error.
        pending: Waiting now.
        running: 1 while the engine runs a request, else 0.
    """

    accepted: int
    completed: int
    failed: int
    pending: int
    running: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """An accepted request. Whoever takes it out of `_waiting` or `_running`, under the lock, ends its future."""

    plan: RequestPlan | ScorePlan
    kind: RequestKind
    future: Future[Results]
    started_s: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class _Errand:
    """Something to be done while no request runs. Its future is ended by the same rule; it counts as no request."""

    action: Callable[[], Any]
    future: Future[Any]
    started_s: float = 0.0


class EngineWorker:
    """Runs accepted requests one after the other on its own thread. A context manager: `close` ends the thread.

    Args:
        engine: Used by this worker alone from now on; its owner closes it, after the worker.
        max_queue: Requests that may wait behind the one that runs.
    """

    def __init__(self, engine: Engine, *, max_queue: int) -> None:
        assert max_queue >= 0
        self.engine = engine
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._errands: deque[_Errand] = deque()
        self._running: _Job | _Errand | None = None
        self._accepting = True
        self._closing = False
        self._failure: RankLostError | None = None
        self._accepted = self._completed = self._failed = 0
        self._paces: deque[float] = deque(maxlen=_RECENT_REQUESTS)  # seconds per unit of work
        self._last_success_s: float | None = None
        # A daemon, so that a kernel that never returns cannot keep the process alive after `close` gave it up.
        self._thread = threading.Thread(target=self._work, name="flowroll-engine", daemon=True)
        self._thread.start()
        engine.on_failure(self._fail)

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @overload
    def submit(self, plan: RequestPlan, kind: Literal["rollout"]) -> Future[list[Rollout]]: ...
    @overload
    def submit(self, plan: RequestPlan, kind: Literal["generate"]) -> Future[list[GeneratedImage]]: ...
    @overload
    def submit(self, plan: ScorePlan, kind: Literal["score"]) -> Future[ScoreAnswer]: ...
    def submit(
        self, plan: RequestPlan | ScorePlan, kind: RequestKind
    ) -> Future[list[Rollout]] | Future[list[GeneratedImage]] | Future[ScoreAnswer]:
        """Takes a planned request; may be called from any thread.

        Args:
            plan: From this worker's engine.
            kind: Which method of the engine runs it.

        Returns:
            Ends in the engine's answer, a `FlowrollError`, or, if cancelled while it waits, in that.

        Raises:
            QueueFullError: Too many wait; try again after its `retry_after_s`.
            ShuttingDownError: The worker takes no more requests.
        """
        with self._changed:
            if not self._accepting:
                raise self._failure or _shutting_down()
            # Counting the running one makes the answer independent of how fast the thread takes up the first.
            taken = len(self._waiting) + isinstance(self._running, _Job)
            if taken > self._max_queue:
                rule = f"the queue must have a free place to take a request, got {len(self._waiting)} waiting"
                retry_s = self._retry_after_s()
                raise QueueFullError(f"{rule}; try again in {retry_s:.0f} s.", retry_after_s=retry_s)
            job = _Job(plan=plan, kind=kind, future=Future())
            self._waiting.append(job)
            self._accepted += 1
            self._changed.notify()
        return job.future  # type: ignore[return-value]  # the overloads tell which of them it holds

    def between_requests(self, action: Callable[[], T]) -> Future[T]:
        """Has something done to the engine as soon as the request that runs has ended, before those that wait.

        May be called from any thread. What is asked for first is done first. There is no limit on how many wait: callers take
        turns.

        Args:
            action: Runs on the worker's thread, while no request does.

        Returns:
            Ends in what the action returns or raises; any other exception than a `FlowrollError` as an `EngineError`.

        Raises:
            ShuttingDownError: The worker takes nothing more.
        """
        with self._changed:
            if not self._accepting:
                raise self._failure or _shutting_down()
            errand = _Errand(action=action, future=Future())
            self._errands.append(errand)
            self._changed.notify()
        return errand.future

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self.stats().pending

    @property
    def running(self) -> int:
        """Requests that run: 0 or 1."""
        return self.stats().running

    @property
    def is_accepting(self) -> bool:
        """False once `drain` or `close` was called, or the thread died."""
        return self._accepting and self._thread.is_alive()

    @property
    def failure(self) -> RankLostError | None:
        """Why the engine's ranks are down, which ended everything that was accepted; None while they are up."""
        return self._failure

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stats(self) -> WorkerStats:
        """The counters, all from the same moment."""
        with self._changed:
            return WorkerStats(
                accepted=self._accepted,
                completed=self._completed,
                failed=self._failed,
                pending=len(self._waiting),
                running=int(isinstance(self._running, _Job)),
            )

    def seconds_since_success(self) -> float | None:
        """Since a request last ended in a result; None: none has."""
        with self._changed:
            return None if self._last_success_s is None else time.monotonic() - self._last_success_s

    def is_progressing(self) -> bool:
        """Whether a request runs now, and not for much longer than its size explains; or something between requests.

        The measure is time, against the recent requests scaled by pixels, steps and samples.
        """
        with self._changed:
            job = self._running
            if job is None:
                return False
            allowed_s = _STALL_UNKNOWN_S
            if self._paces and isinstance(job, _Job):
                allowed_s = max(_STALL_FLOOR_S, _STALL_FACTOR * self._expected_s(job))
            return time.monotonic() - job.started_s < allowed_s

    def drain(self) -> None:
        """Takes no more requests; those that were accepted run on."""
        with self._changed:
            self._accepting = False

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Interrupts the engine, fails what waits or runs with `ShuttingDownError`, ends the thread. May be called twice.

        Args:
            timeout_s: How long the engine may take to its next step. Past it the running request fails all the same, and
                the thread is left behind.
        """
        self._abandon(_shutting_down())
        self.engine.interrupt()
        self._thread.join(min(timeout_s, _LOST_S) if self._failure else timeout_s)
        if self._thread.is_alive() and (stuck := self._running) is not None:
            _log.error("%s does not react to the shutdown; leaving it behind", _shown(stuck))
            self._settle(stuck, error=_shutting_down())

    def _fail(self, error: RankLostError) -> None:
        """Ends everything with the error that took the engine's ranks down; the thread may still wait for one of them."""
        with self._changed:
            self._failure = error
        self._abandon(error)
        if (running := self._running) is not None:
            self._settle(running, error=error)

    def _abandon(self, error: FlowrollError) -> None:
        """Takes no more requests, and ends those that wait."""
        with self._changed:
            self._accepting = False
            self._closing = True
            abandoned: list[_Job | _Errand] = [*self._errands, *self._waiting]
            self._failed += len(self._waiting)
            self._waiting.clear()
            self._errands.clear()
            self._changed.notify_all()
        for job in abandoned:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            self._run(job)
            # Not to keep this request's tensors until the next one comes.
            del job

    def _next_job(self) -> _Job | _Errand | None:
        with self._changed:
            while True:
                if self._closing:
                    return None
                if not self._waiting and not self._errands:
                    self._changed.wait()
                    continue
                job: _Job | _Errand = self._errands.popleft() if self._errands else self._waiting.popleft()
                if job.future.set_running_or_notify_cancel():
                    job.started_s = time.monotonic()
                    self._running = job
                    return job
                self._failed += isinstance(job, _Job)

    def _run(self, job: _Job | _Errand) -> None:
        try:
            results = self._outcome(job)
        except FlowrollError as error:
            self._settle(job, error=error)
        except BaseException as error:
            # Whatever ends one request must not end the thread. The cause is not chained: its traceback holds tensors.
            _log.exception("%s failed in the engine", _shown(job))
            self._settle(job, error=_engine_error(error))
        else:
            self._settle(job, results=results)

    def _outcome(self, job: _Job | _Errand) -> Any:
        if isinstance(job, _Errand):
            return job.action()
        if isinstance(job.plan, ScorePlan):
            return self.engine.run_scores(job.plan)
        return self.engine.rollout(job.plan) if job.kind == "rollout" else self.engine.generate(job.plan)

    def _settle(self, job: _Job | _Errand, *, results: Any = None, error: FlowrollError | None = None) -> None:
        """Ends the running job's future, unless `close` has already."""
        with self._changed:
            if job is not self._running:
                return
            self._running = None
            if isinstance(job, _Errand):
                pass
            elif error is not None:
                self._failed += 1
            else:
                self._completed += 1
                self._last_success_s = time.monotonic()
                self._paces.append((self._last_success_s - job.started_s) / job.plan.work)
        # Outside the lock: a future runs its callbacks here.
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(results)

    def _expected_s(self, job: _Job) -> float:
        """Seconds that the job should take in all, from recent ones; 0 if there were none."""
        return statistics.median(self._paces) * job.plan.work if self._paces else 0.0

    def _retry_after_s(self) -> float:
        """When a place should be free: the rest of what runs now."""
        job = self._running
        rest_s = 0.0 if not isinstance(job, _Job) else self._expected_s(job) - (time.monotonic() - job.started_s)
        return min(max(rest_s, _MIN_RETRY_S), _MAX_RETRY_S)


def _shown(job: _Job | _Errand) -> str:
    """What the log says of it."""
    return f"request_id={job.plan.request_id!r}" if isinstance(job, _Job) else "what was to be done between requests"


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server must run to answer, got a shutdown; send the request to another replica.")


def _engine_error(error: BaseException) -> EngineError:
    """What the caller may know of an unexpected failure: its kind and first line, no traceback."""
    reason = str(error).strip().splitlines()
    shown = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
    return EngineError(f"the engine must run the request to its end, got {shown}; see the server's log for the request id.")
