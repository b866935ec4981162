"""What the loop decides by: how much runs at once, whose step is next, how large a forward may be, when something is stuck."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from flowroll.engine.scheduler.request import Request
from flowroll.errors import InvalidRequestError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How much an engine runs at once.

    Attributes:
        max_batch_samples: Samples in one forward.
        max_running_samples: Samples in memory from their initial noise to their decoded picture.
        max_running_pixels: Pixels of these samples together. A sample that exceeds this by itself runs alone.

    Raises:
        InvalidRequestError: A limit is below 1.
    """

    max_batch_samples: int = 16
    max_running_samples: int = 32
    max_running_pixels: int = 32 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_batch_samples", "max_running_samples", "max_running_pixels"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidRequestError(f"{name} must be >= 1, got {value}; leave it out.", field=name)

    def admits(self, *, pixels: int, num_running: int, running_pixels: int) -> bool:
        """Tells whether one more sample of so many pixels may start."""
        if num_running == 0:
            return True
        return num_running < self.max_running_samples and running_pixels + pixels <= self.max_running_pixels


class RoundRobin(Generic[T]):
    """Whose step is next.

    Samples of one key may share a forward and stand in one lane. Lanes take turns in a circle, and a new lane joins at its end.
    In a lane the oldest go first. So a sample of a rare shape gets its step once in every round, whatever arrives meanwhile.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, list[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[T]:
        for lane in self._lanes.values():
            yield from lane

    def add(self, key: Hashable, item: T) -> None:
        """Puts an item at the end of its lane."""
        self._lanes.setdefault(key, []).append(item)

    def remove(self, key: Hashable, item: T) -> None:
        """Takes an item out; an empty lane loses its place in the circle."""
        lane = self._lanes[key]
        lane.remove(item)
        if not lane:
            del self._lanes[key]

    def next(self, most: Callable[[Hashable], int]) -> tuple[Hashable, list[T]]:
        """Returns the first items of the lane whose turn it is; that lane goes to the end of the circle.

        Args:
            most: How many items to return, by the lane's key.

        Returns:
            The lane's key and its items; none where nothing runs.
        """
        if not self._lanes:
            return None, []
        key, lane = next(iter(self._lanes.items()))
        self._lanes.move_to_end(key)
        return key, lane[: most(key)]


@dataclass(slots=True)
class _Learned:
    failed: int
    most: int
    num_good: int = 0


class OomBackoff:
    """How many samples of a key fit into one forward, learned from the forwards that ran out of memory."""

    # After so many forwards of the most that fits, twice as many samples are tried: others on the device may have let go.
    _PATIENCE = 64
    _MAX_KEYS = 256

    def __init__(self) -> None:
        self._learned: dict[Hashable, _Learned] = {}

    def most(self, key: Hashable, wanted: int) -> int:
        """Returns how many of the wanted samples to put into one forward, at least 1."""
        learned = self._learned.get(key)
        return wanted if learned is None else min(wanted, learned.most)

    def ran_out(self, key: Hashable, size: int) -> None:
        """Notes that a forward of so many samples, more than one, ran out of memory: half as many are tried."""
        before = self._learned.pop(key, None)
        if len(self._learned) >= self._MAX_KEYS:
            del self._learned[next(iter(self._learned))]
        self._learned[key] = _Learned(failed=size if before is None else max(before.failed, size), most=-(-size // 2))

    def went_well(self, key: Hashable, size: int) -> None:
        """Notes that a forward of so many samples came to its end."""
        learned = self._learned.get(key)
        if learned is None or size < learned.most:
            return
        learned.num_good += 1
        if learned.num_good == self._PATIENCE:
            learned.most, learned.num_good = 2 * learned.most, 0
            if learned.most >= learned.failed:
                del self._learned[key]


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error is a lack of memory, of a device or, a plain RuntimeError in torch, of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class Watchdog:
    """How long work takes, learned from recent work: when to come back, and whether something is stuck.

    The loop writes it; any thread may ask, and sees numbers that are at most a turn old.
    """

    _RECENT = 32
    _MIN_RETRY_S, _MAX_RETRY_S = 1.0, 120.0
    # Something is stuck when nothing came to an end for this many times longer than it took lately, and at least the floor.
    _STALL_FACTOR, _STALL_FLOOR_S = 10.0, 60.0
    # A step grows with its pixels to this power at most, because of its attention.
    _GROWTH = 2.0
    # Allowed before anything of the kind was measured: a first, large step on a slow device takes its time.
    _STALL_UNKNOWN_S = 1800.0

    def __init__(self) -> None:
        self._request_paces: deque[float] = deque(maxlen=self._RECENT)  # seconds per unit of a request's work
        self._pieces: tuple[tuple[float, int], ...] = ()  # seconds, pixels of all samples that ran
        self._progress_s: float | None = None

    def note_request(self, request: Request, now_s: float) -> None:
        """Notes that a request ended in a result."""
        assert request.admitted_s is not None
        self._request_paces.append((now_s - request.admitted_s) / request.work)

    def note_piece(self, started_s: float, now_s: float, *, running_pixels: int = 0) -> None:
        """Notes that a piece of work came to an end: a step while so many pixels ran, or something else."""
        self._pieces = (*self._pieces[1 - self._RECENT :], (now_s - started_s, running_pixels))
        self._progress_s = now_s

    def free_at_s(self, running: Iterable[Request]) -> float | None:
        """Estimates when a place in the queue is free: the earliest end of what runs now; None: nothing is known."""
        if not self._request_paces:
            return None
        pace = statistics.median(self._request_paces)
        return min((one.admitted_s + pace * one.work for one in running if one.admitted_s is not None), default=None)

    @classmethod
    def retry_after_s(cls, free_at_s: float | None, now_s: float) -> float:
        """Tells a refused caller when to come back, in seconds."""
        return min(max(0.0 if free_at_s is None else free_at_s - now_s, cls._MIN_RETRY_S), cls._MAX_RETRY_S)

    def is_task_stuck(self, since_s: float, now_s: float) -> bool:
        """Tells whether something that is done between steps takes longer than anything should."""
        return now_s - since_s >= self._STALL_UNKNOWN_S

    def is_stuck(self, since_s: float, now_s: float, running_pixels: int) -> bool:
        """Tells whether nothing came to an end for longer than recent work explains.

        Args:
            since_s: When what runs now was admitted.
            now_s: The time.
            running_pixels: Pixels of all samples that run now.
        """
        latest_s = since_s if self._progress_s is None else max(since_s, self._progress_s)
        return now_s - latest_s >= self._allowed_s(running_pixels)

    def _allowed_s(self, running_pixels: int) -> float:
        pieces = self._pieces
        if not pieces:
            return self._STALL_UNKNOWN_S
        slowest_s = self._STALL_FACTOR * max(seconds for seconds, _ in pieces)
        largest = max(pixels for _, pixels in pieces)
        # What is larger than all that was measured may take longer by so much, but not for ever.
        growth = max(running_pixels / largest, 1.0) ** self._GROWTH if largest else 1.0
        return max(self._STALL_FLOOR_S, min(slowest_s * growth, max(slowest_s, self._STALL_UNKNOWN_S)))
