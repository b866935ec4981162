"""Whose step is next.

Samples of one key may share a forward and stand in one lane. Lanes take turns in a circle, and a new lane joins at its end; in
a lane the oldest go first. So a sample of a rare shape gets its step once in every round, whatever arrives meanwhile: a round
is as long as there are lanes, newcomers stand behind those that wait, and in front of a sample in its own lane there are only
older ones, which end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """The running samples, in lanes."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, list[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[T]:
        for lane in self._lanes.values():
            yield from lane

    def add(self, key: Hashable, item: T) -> None:
        """Puts it at the end of its lane."""
        self._lanes.setdefault(key, []).append(item)

    def remove(self, key: Hashable, item: T) -> None:
        """Takes it out; an empty lane loses its place in the circle."""
        lane = self._lanes[key]
        lane.remove(item)
        if not lane:
            del self._lanes[key]

    def next(self, most: Callable[[Hashable], int]) -> list[T]:
        """The first items of the lane whose turn it is, which goes to the end of the circle; empty where nothing runs.

        Args:
            most: How many, by the lane's key.
        """
        if not self._lanes:
            return []
        key, lane = next(iter(self._lanes.items()))
        self._lanes.move_to_end(key)
        return lane[: most(key)]
