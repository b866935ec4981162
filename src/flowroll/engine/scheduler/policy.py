"""The rules of the loop: how much runs at once, whose step is next, how large a forward is, and when something is stuck."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from flowroll.errors import InvalidRequestError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """The limits of what an engine runs at the same time.

    Attributes:
        max_batch_samples: The largest number of samples in one forward.
        max_running_samples: The largest number of samples in memory, from their initial noise to their decoded picture.
        max_running_pixels: The largest number of pixels of these samples together. A sample that exceeds it runs alone.

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

    @property
    def max_ready_samples(self) -> int:
        """How many samples are encoded ahead at most: one forward of those that can run, which they can then share at once."""
        return min(self.max_batch_samples, self.max_running_samples)

    def admits(self, *, pixels: int, num_running: int, running_pixels: int) -> bool:
        """Returns whether one more sample with this number of pixels may start."""
        if num_running == 0:
            return True
        return num_running < self.max_running_samples and running_pixels + pixels <= self.max_running_pixels


class RoundRobin(Generic[T]):
    """Decides which samples take the next step.

    Samples with the same batch key may share a forward and are kept in one lane. Lanes take turns in a circle, and a new lane
    is added at its end. Within a lane the oldest samples go first. So a sample of a rare shape takes a step in every round,
    whatever arrives meanwhile.
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
        """Removes an item from its lane. An empty lane loses its place in the circle."""
        lane = self._lanes[key]
        lane.remove(item)
        if not lane:
            del self._lanes[key]

    def next(self, most: Callable[[Hashable], int]) -> tuple[Hashable, list[T]]:
        """Returns the first items of the lane whose turn it is, and moves that lane to the end of the circle.

        Args:
            most: Returns the largest number of items to return for a lane's key.

        Returns:
            The lane's key and its items; None and an empty list if there are no lanes.
        """
        key, items = self.peek(most)
        if items:
            self._lanes.move_to_end(key)
        return key, items

    def peek(self, most: Callable[[Hashable], int]) -> tuple[Hashable, list[T]]:
        """Returns what `next` would return, and leaves the lane where it is."""
        if not self._lanes:
            return None, []
        key, lane = next(iter(self._lanes.items()))
        return key, lane[: most(key)]


class Gathering:
    """Decides how long samples wait with their next step for a request that is being encoded, to share the forward with it.

    They wait no longer than they would take without it: for one step, by the duration of the last one, or before their first
    one, for all of their steps. Each request is waited for once, so that one that takes very long to encode delays one step.
    """

    def __init__(self) -> None:
        self._step_s = 0.0
        self._until_s: float | None = None
        self._given_up: int | None = None

    def note_step(self, seconds: float) -> None:
        """Notes that samples have taken a step, and how long it took."""
        self._step_s, self._until_s = seconds, None

    def until_s(self, request_id: int, *, steps: int, now_s: float) -> float | None:
        """Returns until when to wait for a request, in monotonic seconds; None: no longer.

        Args:
            request_id: The request, by its id in the scheduler.
            steps: How many of their steps the samples may wait for.
            now_s: The current time, in monotonic seconds.
        """
        if request_id == self._given_up:
            return None
        if self._until_s is None:
            self._until_s = now_s + steps * self._step_s
        if now_s < self._until_s:
            return self._until_s
        self._given_up = request_id
        return None


@dataclass(slots=True)
class _Learned:
    failed: int
    most: int
    num_good: int = 0


class OomBackoff:
    """Learns from forwards that ran out of memory how many samples with a batch key fit into one forward."""

    # After this number of successful forwards of the largest size, twice as many samples are tried: other users of the device
    # may have freed memory.
    _PATIENCE = 64
    _MAX_KEYS = 256

    def __init__(self) -> None:
        self._learned: dict[Hashable, _Learned] = {}

    def most(self, key: Hashable, wanted: int) -> int:
        """Returns how many of the `wanted` samples to put into one forward, at least 1."""
        learned = self._learned.get(key)
        return wanted if learned is None else min(wanted, learned.most)

    def ran_out(self, key: Hashable, size: int) -> None:
        """Notes that a forward of `size` samples, more than one, ran out of memory: half as many are tried next."""
        before = self._learned.pop(key, None)
        if len(self._learned) >= self._MAX_KEYS:
            del self._learned[next(iter(self._learned))]
        self._learned[key] = _Learned(failed=size if before is None else max(before.failed, size), most=-(-size // 2))

    def went_well(self, key: Hashable, size: int) -> None:
        """Notes that a forward of `size` samples succeeded."""
        learned = self._learned.get(key)
        if learned is None or size < learned.most:
            return
        learned.num_good += 1
        if learned.num_good == self._PATIENCE:
            learned.most, learned.num_good = 2 * learned.most, 0
            if learned.most >= learned.failed:
                del self._learned[key]


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out, on a device or on the host, where torch raises a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class Watchdog:
    """Learns from recent work how long work takes, to tell whether something is stuck.

    The loop writes it. Any thread may read it, and sees numbers that are at most one turn old.
    """

    _RECENT = 32
    # Work is stuck when nothing has ended for this many times the duration of the slowest recent work, and at least the floor.
    _STALL_FACTOR, _STALL_FLOOR_S = 10.0, 60.0
    # The duration of a step grows at most with its pixels to this power, because of attention.
    _GROWTH = 2.0
    # The time that is allowed before any work was measured: a first, large step on a slow device may take long.
    _STALL_UNKNOWN_S = 1800.0

    def __init__(self) -> None:
        self._pieces: tuple[tuple[float, int], ...] = ()  # seconds, pixels of all samples that ran
        self._progress_s: float | None = None

    def note_piece(self, started_s: float, now_s: float, *, running_pixels: int = 0) -> None:
        """Notes that a piece of work has ended: a step, with the pixels of all samples in memory, or something else, with 0."""
        self._pieces = (*self._pieces[1 - self._RECENT :], (now_s - started_s, running_pixels))
        self._progress_s = now_s

    def is_task_stuck(self, since_s: float, now_s: float) -> bool:
        """Returns whether a control task that began at `since_s` has taken longer than any task should."""
        return now_s - since_s >= self._STALL_UNKNOWN_S

    def is_stuck(self, since_s: float, now_s: float, running_pixels: int) -> bool:
        """Returns whether no work has ended for longer than the durations of recent work explain.

        Args:
            since_s: When the oldest running request was admitted, in monotonic seconds.
            now_s: The current time, in monotonic seconds.
            running_pixels: The number of pixels of all samples in memory.
        """
        latest_s = since_s if self._progress_s is None else max(since_s, self._progress_s)
        return now_s - latest_s >= self._allowed_s(running_pixels)

    def _allowed_s(self, running_pixels: int) -> float:
        pieces = self._pieces
        if not pieces:
            return self._STALL_UNKNOWN_S
        slowest_s = self._STALL_FACTOR * max(seconds for seconds, _ in pieces)
        largest = max(pixels for _, pixels in pieces)
        # Work that is larger than any that was measured may take longer in proportion, up to a limit.
        growth = max(running_pixels / largest, 1.0) ** self._GROWTH if largest else 1.0
        return max(self._STALL_FLOOR_S, min(slowest_s * growth, max(slowest_s, self._STALL_UNKNOWN_S)))
