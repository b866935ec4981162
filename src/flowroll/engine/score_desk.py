"""A server's requests for scores: each ends once, in its scores, an error of the engine, or the reason why nobody wants it."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from flowroll.engine.batching import WorkerStats
from flowroll.engine.batching.book import cancelled
from flowroll.engine.engine import Engine
from flowroll.engine.scoring import ScorePlan
from flowroll.errors import FlowrollError, QueueFullError
from flowroll.types import ScoreAnswer

_RETRY_S = 1.0


class ScoreDesk:
    """See the module. May be called from any thread.

    Args:
        engine: Scores.
        max_waiting: Requests that may wait behind the one that is being scored.
    """

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self._engine, self._max_waiting = engine, max_waiting
        self._lock = threading.Lock()
        self._accepted = self._completed = self._failed = 0
        # What a caller waits for, with its id and the errand that is done for it.
        self._open: dict[Future[ScoreAnswer], tuple[str, Future[ScoreAnswer]]] = {}

    def submit(self, plan: ScorePlan) -> Future[ScoreAnswer]:
        """Takes a planned request.

        Raises:
            QueueFullError: Too many wait.
            ShuttingDownError: The engine was interrupted or closed.
        """
        promise: Future[ScoreAnswer] = Future()
        # Nobody but this desk ends it.
        promise.set_running_or_notify_cancel()
        with self._lock:
            if len(self._open) > self._max_waiting:
                raise QueueFullError(
                    f"requests for scores must be at most {self._max_waiting} in waiting, got one more; try again in "
                    f"{_RETRY_S:.0f} s.",
                    retry_after_s=_RETRY_S,
                )
            errand = self._engine.submit_scores(plan)
            self._open[promise] = plan.request_id, errand
            self._accepted += 1
        errand.add_done_callback(lambda _: self._note_scores(promise, errand))
        return promise

    def end(self, promise: Future[ScoreAnswer], error: FlowrollError) -> bool:
        """Ends a request in this error; one that is being scored is told so at once. False: it has ended already."""
        with self._lock:
            _, errand = self._open.pop(promise, (None, None))
            self._failed += errand is not None
        if errand is None:
            return False
        # One that waits is never begun.
        errand.cancel()
        promise.set_exception(error)
        return True

    def abort(self, request_id: str | None) -> int:
        """Cancels the requests of this id, or all; returns how many there were."""
        with self._lock:
            meant = [promise for promise, (name, _) in self._open.items() if request_id in (None, name)]
        return sum(self.end(promise, cancelled()) for promise in meant)

    def stats(self) -> WorkerStats:
        """The counters; one that is being scored is among those that wait."""
        with self._lock:
            return WorkerStats(
                accepted=self._accepted, completed=self._completed, failed=self._failed, pending=len(self._open), running=0
            )

    def _note_scores(self, promise: Future[ScoreAnswer], errand: Future[ScoreAnswer]) -> None:
        """The errand has ended; whoever still waits for it is told how."""
        error = cancelled() if errand.cancelled() else errand.exception()
        with self._lock:
            if self._open.pop(promise, None) is None:
                return
            self._failed += error is not None
            self._completed += error is None
        if error is None:
            promise.set_result(errand.result())
        else:
            promise.set_exception(error)
