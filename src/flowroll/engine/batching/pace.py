"""How long requests take, learned from recent ones: when to come back, and when something is stuck."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from flowroll.engine.batching.jobs import Job

_RECENT = 32
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 120.0
# Something is stuck when nothing came to an end for this many times longer than it took lately, and at least the floor.
_STALL_FACTOR, _STALL_FLOOR_S = 10.0, 60.0
# A step grows with its pixels to this power at most, by its attention.
_GROWTH = 2.0
# Before anything of the kind was measured: a first, large step on a slow device takes its time.
_STALL_UNKNOWN_S = 1800.0


class Pace:
    """What recent work took. Its owner's lock guards it."""

    def __init__(self) -> None:
        self._request_paces: deque[float] = deque(maxlen=_RECENT)  # seconds per unit of a request's work
        self._pieces: deque[tuple[float, int]] = deque(maxlen=_RECENT)  # seconds, pixels of all samples that ran
        self._progress_s: float | None = None

    def note_request(self, job: Job, now_s: float) -> None:
        """A request ended in a result."""
        assert job.taken_s is not None
        self._request_paces.append((now_s - job.taken_s) / job.work)

    def note_piece(self, seconds: float, now_s: float, running_pixels: int) -> None:
        """A piece of work came to an end: a step, while so many pixels ran, or something else, which says nothing of them."""
        self._pieces.append((seconds, running_pixels))
        self._progress_s = now_s

    def retry_after_s(self, running: Iterable[Job], now_s: float) -> float:
        """When a place should be free: the least that is left of what runs now."""
        pace = statistics.median(self._request_paces) if self._request_paces else 0.0
        rests = [pace * job.work - (now_s - job.taken_s) for job in running if job.taken_s is not None]
        return min(max(min(rests, default=0.0), _MIN_RETRY_S), _MAX_RETRY_S)

    @staticmethod
    def is_errand_stuck(since_s: float, now_s: float) -> bool:
        """Whether something that is done between steps takes longer than anything should."""
        return now_s - since_s >= _STALL_UNKNOWN_S

    def is_stuck(self, since_s: float, now_s: float, running_pixels: int) -> bool:
        """Whether nothing came to an end for longer than recent work explains.

        Args:
            since_s: When what runs now was taken up.
            now_s: The time.
            running_pixels: Of all samples that run now.
        """
        latest_s = since_s if self._progress_s is None else max(since_s, self._progress_s)
        return now_s - latest_s >= self._allowed_s(running_pixels)

    def _allowed_s(self, running_pixels: int) -> float:
        if not self._pieces:
            return _STALL_UNKNOWN_S
        slowest_s = _STALL_FACTOR * max(seconds for seconds, _ in self._pieces)
        largest = max(pixels for _, pixels in self._pieces)
        # What is larger than all that was measured may take longer by so much, but not for ever.
        growth = max(running_pixels / largest, 1.0) ** _GROWTH if largest else 1.0
        return max(_STALL_FLOOR_S, min(slowest_s * growth, max(slowest_s, _STALL_UNKNOWN_S)))
