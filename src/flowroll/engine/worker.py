"""A server's hold on an engine: a bounded queue in front of it, and what a server has to know of its state.

It knows nothing of HTTP. The life of an accepted request is the batcher's (batching/): it ends in exactly one result or one
error, whatever happens to the engine, to the requests around it or to the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from flowroll.engine.batching import Accepted, ExclusiveMode, LoadStats, PauseMode, WorkerStats
from flowroll.engine.batching.book import cancelled, too_late
from flowroll.engine.batching.steps import engine_error
from flowroll.engine.engine import Engine, RequestKind
from flowroll.engine.plan import RequestPlan
from flowroll.engine.score_desk import ScoreDesk
from flowroll.engine.scoring import ScorePlan
from flowroll.errors import FlowrollError, RankLostError, ShuttingDownError, fresh
from flowroll.types import GeneratedImage, Rollout, ScoreAnswer

__all__ = ["EngineWorker", "RequestKind", "WorkerStats"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
# What a thread gets to come back from the collective of a lost rank.
_LOST_S = 3.0


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
        self._scores = ScoreDesk(engine, max_waiting=max_queue)
        engine.batcher.start()

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @overload
    def submit(self, plan: RequestPlan, kind: Literal["rollout"], *, timeout_s: float | None = None) -> Accepted[Rollout]: ...
    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["generate"], *, timeout_s: float | None = None
    ) -> Accepted[GeneratedImage]: ...
    def submit(self, plan: RequestPlan, kind: RequestKind, *, timeout_s: float | None = None) -> Accepted[Any]:
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

    def submit_scores(self, plan: ScorePlan) -> Future[ScoreAnswer]:
        """Takes a planned request for scores; may be called from any thread.

        It waits in no queue of requests: scores are made between the steps of requests, one request for scores after the other.

        Returns:
            Ends in the scores or a `FlowrollError`; `cancel_scores`, `expire_scores` and `abort` end it early.

        Raises:
            QueueFullError: As many requests for scores wait as may wait for samples.
            ShuttingDownError: The worker takes no more requests.
        """
        self._check_draining()
        return self._scores.submit(plan)

    def cancel_scores(self, scores: Future[ScoreAnswer]) -> bool:
        """Ends a request for scores whose caller went away. False: it has ended already."""
        return self._scores.end(scores, cancelled())

    def expire_scores(self, scores: Future[ScoreAnswer], timeout_s: float) -> bool:
        """Ends a request for scores that has not ended after so long. False: it has."""
        return self._scores.end(scores, too_late(timeout_s))

    def cancel(self, accepted: Accepted[Any]) -> bool:
        """Ends a request whose caller went away, whether it waits or runs. False: it has ended already."""
        return self.engine.batcher.cancel(accepted)

    def abort(self, request_id: str | None) -> int:
        """Cancels the requests of this id, or all, those for scores too; returns how many there were."""
        return self.engine.batcher.abort(request_id) + self._scores.abort(request_id)

    def pause(self, mode: PauseMode) -> None:
        """Refuses new requests, and takes up none of those that wait, until `resume`; see `Batcher.pause`."""
        self.engine.batcher.pause(mode)

    def resume(self) -> None:
        """Goes on after `pause`."""
        self.engine.batcher.resume()

    def between_requests(self, action: Callable[[], T], *, mode: ExclusiveMode = "drain") -> Future[T]:
        """Has something done to the engine while no request runs, before those that wait; see `Batcher.exclusive`.

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

        return self.engine.batcher.exclusive(guarded, mode=mode)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self.stats().pending

    @property
    def running(self) -> int:
        """Requests that were taken up and have not ended."""
        return self.stats().running

    @property
    def is_accepting(self) -> bool:
        """False once `drain` or `close` was called, or a thread died. A pause refuses requests too, but ends."""
        return not self._is_draining and self.engine.batcher.is_alive

    @property
    def failure(self) -> RankLostError | None:
        """Why the engine's ranks are down, which ended everything that was accepted; None while they are up."""
        return self.engine.failure

    @property
    def is_alive(self) -> bool:
        """Whether the threads run."""
        return self.engine.batcher.is_alive

    @property
    def is_paused(self) -> bool:
        """Whether new requests are refused until `resume`."""
        return self.load().is_paused

    def load(self) -> LoadStats:
        """What runs and what ran, all numbers from the same moment."""
        return self.engine.batcher.load()

    def stats(self) -> WorkerStats:
        """The counters, requests for scores among them."""
        scores, requests = self.score_stats(), self.load().requests
        return WorkerStats(
            **{field.name: getattr(scores, field.name) + getattr(requests, field.name) for field in fields(WorkerStats)}
        )

    def score_stats(self) -> WorkerStats:
        """The counters of requests for scores alone; none counts as running."""
        return self._scores.stats()

    def seconds_since_success(self) -> float | None:
        """Since a request last ended in a result; None: none has."""
        return None if self._last_success_s is None else time.monotonic() - self._last_success_s

    def is_progressing(self) -> bool:
        """Whether requests run now, and something came to an end lately, measured by what recent work took."""
        return self.engine.batcher.is_progressing()

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
        return self.engine.batcher.halt(min(timeout_s, _LOST_S) if self.failure else timeout_s)

    def _check_draining(self) -> None:
        if self._is_draining:
            if (failure := self.failure) is not None:
                raise fresh(failure)
            raise ShuttingDownError("the server must run to answer, got a shutdown; send the request to another replica.")

    def _note_end(self, ended: Future[Any]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            self._last_success_s = time.monotonic()
