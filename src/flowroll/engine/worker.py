"""A server's hold on an engine: a bounded queue in front of it, and what a server has to know of its state.

It knows nothing of HTTP. The life of an accepted request is the scheduler's (scheduler/): it ends in exactly one result or one
error, whatever happens to the engine, to the requests around it or to the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from flowroll.engine.engine import Engine, RequestKind
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import ExclusiveMode, LoadStats, PauseMode, RequestCounts, RequestFuture
from flowroll.engine.scheduler.request import engine_error
from flowroll.engine.scoring import ScorePlan
from flowroll.errors import FlowrollError, QueueFullError, RankLostError, ShuttingDownError, fresh
from flowroll.types import GeneratedImage, Rollout, ScoreAnswer

__all__ = ["EngineWorker", "RequestCounts", "RequestKind"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
# What a thread gets to come back from the collective of a lost rank.
_LOST_S = 3.0
_RETRY_S = 1.0


class EngineWorker:
    """Gives requests to an engine's threads. A context manager: `close` ends the threads.

    Args:
        engine: Used by this worker alone from now on; its owner closes it, after the worker.
        max_queue: Requests that may wait behind those that run.
    """

    def __init__(self, engine: Engine, *, max_queue: int) -> None:
        assert max_queue >= 0
        self.engine = engine
        self._max_queue = max_queue
        self._is_draining = False
        self._last_success_s: float | None = None
        # Requests for scores that have not ended.
        self._scores: set[Future[ScoreAnswer]] = set()
        self._submitting_scores = threading.Lock()
        engine.scheduler.start()

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["rollout"], *, timeout_s: float | None = None
    ) -> RequestFuture[Rollout]: ...
    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["generate"], *, timeout_s: float | None = None
    ) -> RequestFuture[GeneratedImage]: ...
    def submit(self, plan: RequestPlan, kind: RequestKind, *, timeout_s: float | None = None) -> RequestFuture[Any]:
        """Takes a planned request; may be called from any thread.

        Args:
            plan: From this worker's engine.
            kind: What its samples become.
            timeout_s: It is given up when it has not ended after so long; None: never.

        Returns:
            Ends in the engine's answer, a `FlowrollError`, or, if cancelled while it waits, in that.

        Raises:
            PausedError: Generation is paused.
            QueueFullError: Too many wait; try again after its `retry_after_s`.
            ShuttingDownError: The worker takes no more requests.
        """
        self._check_draining()
        accepted = self.engine.submit(plan, kind, timeout_s=timeout_s, max_waiting=self._max_queue)
        accepted.add_done_callback(self._note_end)
        return accepted

    def submit_scores(self, plan: ScorePlan, *, timeout_s: float | None = None) -> Future[ScoreAnswer]:
        """Takes a planned request for scores; may be called from any thread.

        It waits in no queue of requests: scores are made between the steps of requests, one request for scores after the other.

        Args:
            plan: From this worker's engine.
            timeout_s: It is given up when it has not ended after so long; None: never.

        Returns:
            Ends in the scores or a `FlowrollError`; `cancel` and `abort` end it early.

        Raises:
            QueueFullError: As many requests for scores wait as may wait for samples.
            ShuttingDownError: The worker takes no more requests.
        """
        self._check_draining()
        with self._submitting_scores:
            if len(self._scores) > self._max_queue:
                raise QueueFullError(
                    f"requests for scores must be at most {self._max_queue} in waiting, got one more; try again in "
                    f"{_RETRY_S:.0f} s.",
                    retry_after_s=_RETRY_S,
                )
            scores = self.engine.submit_scores(plan, timeout_s=timeout_s)
            self._scores.add(scores)
        scores.add_done_callback(self._scores.discard)
        return scores

    def cancel(self, future: Future[Any]) -> None:
        """Ends a request whose caller went away, whether it waits or runs."""
        self.engine.scheduler.cancel(future)

    def abort(self, request_id: str | None) -> Future[int]:
        """Cancels the requests of this id, or all, those for scores too; the future tells how many there were."""
        return self.engine.scheduler.abort(request_id)

    def pause(self, mode: PauseMode) -> Future[None]:
        """Refuses new requests, and takes up none of those that wait, until `resume`; see `Scheduler.pause`."""
        return self.engine.scheduler.pause(mode)

    def resume(self) -> Future[None]:
        """Goes on after `pause`."""
        return self.engine.scheduler.resume()

    def between_requests(self, action: Callable[[], T], *, mode: ExclusiveMode = "drain") -> Future[T]:
        """Has something done to the engine while no request runs, before those that wait; see `Scheduler.exclusive`.

        There is no limit on how many wait: callers take turns.

        Returns:
            Ends in what the action returns or raises; any other exception than a `FlowrollError` as an `EngineError`.

        Raises:
            ShuttingDownError: The worker takes nothing more.
        """
        self._check_draining()

        def guarded() -> T:
            try:
                return action()
            except FlowrollError:
                raise
            except BaseException as error:
                _log.exception("what was to be done between requests failed in the engine")
                # Not chained: its traceback holds tensors.
                raise engine_error(error) from None

        return self.engine.scheduler.exclusive(guarded, mode=mode)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self.stats().pending

    @property
    def running(self) -> int:
        """Returns the number of requests that were admitted and have not ended."""
        return self.stats().running

    @property
    def is_accepting(self) -> bool:
        """False once `drain` or `close` was called, or a thread died. A pause refuses requests too, but ends."""
        return not self._is_draining and self.engine.scheduler.is_alive

    @property
    def failure(self) -> RankLostError | None:
        """Why the engine's ranks are down, which ended everything that was accepted; None while they are up."""
        return self.engine.failure

    @property
    def is_alive(self) -> bool:
        """Whether the threads run."""
        return self.engine.scheduler.is_alive

    @property
    def is_paused(self) -> bool:
        """Whether new requests are refused until `resume`."""
        return self.load().is_paused

    def load(self) -> LoadStats:
        """What runs and what ran, all numbers from the same moment."""
        return self.engine.scheduler.load()

    def stats(self) -> RequestCounts:
        """The counters, requests for scores among them."""
        scores, requests = self.score_stats(), self.load().requests
        return RequestCounts(
            **{field.name: getattr(scores, field.name) + getattr(requests, field.name) for field in fields(RequestCounts)}
        )

    def score_stats(self) -> RequestCounts:
        """The counters of requests for scores alone; none counts as running."""
        return self.load().log_probs

    def seconds_since_success(self) -> float | None:
        """Since a request last ended in a result; None: none has."""
        return None if self._last_success_s is None else time.monotonic() - self._last_success_s

    def is_progressing(self) -> bool:
        """Whether requests run now, and something came to an end lately, measured by what recent work took."""
        return self.engine.scheduler.is_progressing()

    def drain(self) -> None:
        """Takes no more requests; those that were accepted run on."""
        self._is_draining = True

    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Fails what waits or runs with `ShuttingDownError`, ends the threads. May be called twice.

        Args:
            timeout_s: How long the engine may take to end what it is at. Past it the threads are left behind.

        Returns:
            Whether the threads have ended.
        """
        self._is_draining = True
        self.engine.interrupt()
        return self.engine.scheduler.halt(min(timeout_s, _LOST_S) if self.failure else timeout_s)

    def _check_draining(self) -> None:
        if self._is_draining:
            if (failure := self.failure) is not None:
                raise fresh(failure)
            raise ShuttingDownError("the server must run to answer, got a shutdown; send the request to another replica.")

    def _note_end(self, ended: Future[Any]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            self._last_success_s = time.monotonic()
