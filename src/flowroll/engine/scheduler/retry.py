"""Tells refused callers when to come back: by the work that is ahead of them, and by how fast the engine works."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable

# The longer the latest, the fewer refusals a crowd costs; the shorter, the sooner those come who may come back at all.
_MIN_S, _MAX_S = 1.0, 600.0
# Callers that were refused at the same moment must not come back at the same moment.
_JITTER = 0.25


class Throughput:
    """Learns from recent ends how many seconds the engine takes for a unit of work, whatever shares its steps.

    It measures time between ends while the engine is busy, not how long each request took: of requests that run side by side
    each takes long, and many end.
    """

    _RECENT = 32

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=self._RECENT)
        self._last_end_s = -math.inf

    def note_end(self, work: int, *, busy_since_s: float, now_s: float) -> None:
        """Notes that work of this amount has ended.

        Args:
            work: The amount, in any unit.
            busy_since_s: When the oldest of the work that was under way was begun, in monotonic seconds.
            now_s: The current time, in monotonic seconds.
        """
        self._ends.append((now_s - max(self._last_end_s, busy_since_s), work))
        self._last_end_s = now_s

    @property
    def seconds_per_work(self) -> float | None:
        """The seconds of a unit of work; None if nothing has ended yet."""
        work = sum(one for _, one in self._ends)
        return sum(seconds for seconds, _ in self._ends) / work if work else None


class RetrySchedule:
    """Gives refused callers appointments, one after the other, as fast as the engine works.

    If every refused caller were told to come back when the present queue is done, all that were refused meanwhile would come
    at once, and all but a few would be refused again; the more of them there are, the more of the machine their refusals
    take. With appointments they come at the pace at which they can be served.

    Args:
        draw: Draws a number from [0, 1).
    """

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._next_s = -math.inf

    def clear(self) -> None:
        """Forgets the appointments: there is room again, and whoever comes is served."""
        self._next_s = -math.inf

    def after_s(self, *, ahead_s: float, own_s: float, now_s: float) -> float:
        """Returns after how many seconds a refused caller should come back, from 1 to 600.

        Args:
            ahead_s: The seconds of the work that runs and waits. Half of it is done when the first one comes back, so that
                there is room and the engine has something to do until then.
            own_s: The seconds of the caller's own work.
            now_s: The current time, in monotonic seconds.
        """
        appointment_s = max(self._next_s, now_s + ahead_s / 2)
        self._next_s = min(appointment_s + own_s, now_s + _MAX_S)
        wait_s = min(appointment_s - now_s, _MAX_S) * (1 - _JITTER * self._draw())
        return max(wait_s, _MIN_S)
