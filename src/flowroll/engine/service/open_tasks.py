"""Tasks between the steps of samples, of which a bounded number may be under way or wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from flowroll.engine.scheduler.retry import RetrySchedule, Throughput
from flowroll.errors import QueueFullError

T = TypeVar("T")


class OpenTasks:
    """The tasks of one kind that have not ended. Any thread may use it.

    Args:
        most: How many there may be.
        rule: What must be of them, for the caller of one more: "<what> must be at most <number> ...".
    """

    def __init__(self, most: int, rule: str) -> None:
        self._most, self._rule = most, rule
        # When each was accepted, in monotonic seconds, and its work.
        self._open: dict[Future[Any], tuple[float, int]] = {}
        self._lock = threading.Lock()
        self._throughput, self._retries = Throughput(), RetrySchedule()

    def add(self, submit: Callable[[], Future[T]], *, work: int = 1) -> Future[T]:
        """Submits a task of this amount of work, unless too many have not ended.

        Raises:
            QueueFullError: They have not; it says when to try again, by how fast they end.
        """
        with self._lock:
            if len(self._open) >= self._most:
                pace = self._throughput.seconds_per_work or 0.0
                ahead_s = pace * sum(one for _, one in self._open.values())
                retry_s = self._retries.after_s(ahead_s=ahead_s, own_s=pace * work, now_s=time.monotonic())
                raise QueueFullError(f"{self._rule}, got one more; try again in {retry_s:.0f} s.", retry_after_s=retry_s)
            if len(self._open) <= self._most / 2:
                self._retries.clear()
            task = submit()
            self._open[task] = time.monotonic(), work
        task.add_done_callback(self._end)
        return task

    def _end(self, task: Future[Any]) -> None:
        with self._lock:
            busy_since_s = min(since_s for since_s, _ in self._open.values())
            _, work = self._open.pop(task)
            self._throughput.note_end(work, busy_since_s=busy_since_s, now_s=time.monotonic())
