"""The requests to recompute log-probs of one engine, of which a bounded number may wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from flowroll.engine.scheduler.retry import RetrySchedule, Throughput
from flowroll.errors import QueueFullError
from flowroll.types import ScoreAnswer


class OpenScores:
    """The requests to recompute log-probs that have not ended. Any thread may use it."""

    def __init__(self) -> None:
        # When each was accepted, in monotonic seconds, and its work.
        self._open: dict[Future[ScoreAnswer], tuple[float, int]] = {}
        self._lock = threading.Lock()
        self._throughput, self._retries = Throughput(), RetrySchedule()

    def add(self, work: int, max_waiting: int, submit: Callable[[], Future[ScoreAnswer]]) -> Future[ScoreAnswer]:
        """Submits a request, unless more than `max_waiting` have not ended.

        Raises:
            QueueFullError: They have not.
        """
        with self._lock:
            if len(self._open) > max_waiting:
                pace = self._throughput.seconds_per_work or 0.0
                ahead_s = pace * sum(one for _, one in self._open.values())
                retry_s = self._retries.after_s(ahead_s=ahead_s, own_s=pace * work, now_s=time.monotonic())
                rule = f"requests for scores must be at most {max_waiting} in waiting, got one more"
                raise QueueFullError(f"{rule}; try again in {retry_s:.0f} s.", retry_after_s=retry_s)
            if len(self._open) <= max_waiting / 2:
                self._retries.clear()
            scores = submit()
            self._open[scores] = time.monotonic(), work
        scores.add_done_callback(self._end)
        return scores

    def _end(self, scores: Future[ScoreAnswer]) -> None:
        with self._lock:
            busy_since_s = min(since_s for since_s, _ in self._open.values())
            _, work = self._open.pop(scores)
            self._throughput.note_end(work, busy_since_s=busy_since_s, now_s=time.monotonic())
