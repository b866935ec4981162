"""What a server holds, sampled while it runs, and whether it grows."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
# Samples that follow each other resemble each other: the line is fitted to the means of so many spans of time.
_STRETCHES = 20
# Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = {3: 3.18, 5: 2.57, 8: 2.31, 10: 2.23, 12: 2.18, 15: 2.13, 18: 2.10, 30: 2.04}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a server holds at a moment: its process and that of its engine together.

    Attributes:
        minute: Since the watch began.
        rss_kib: Resident memory.
        fds: Open file descriptors.
        threads: Threads.
    """

    minute: float
    rss_kib: float
    fds: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """A least-squares slope per minute with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def holding(pid: int, began_s: float) -> Holding:
    """Reads /proc; Linux alone. Memory that the processes share counts in each."""
    processes = _with_children(pid)
    return Holding(
        minute=(time.monotonic() - began_s) / 60,
        rss_kib=sum(int((process / "statm").read_text().split()[1]) for process in processes) * _PAGE_KIB,
        fds=sum(len(os.listdir(process / "fd")) for process in processes),
        threads=sum(len(os.listdir(process / "task")) for process in processes),
    )


def _with_children(pid: int) -> list[Path]:
    process = Path(f"/proc/{pid}")
    children = [child for task in (process / "task").iterdir() for child in (task / "children").read_text().split()]
    return [process, *(found for child in children for found in _with_children(int(child)))]


def slope(minutes: Sequence[float], values: Sequence[float]) -> Slope:
    """Of a line through the values, or, if they are many and so near each other alike, through the means of equal spans."""
    spans = min(_STRETCHES, len(values))
    assert spans >= 5
    edges = [len(values) * index // spans for index in range(spans + 1)]
    xs = [statistics.fmean(minutes[a:b]) for a, b in itertools.pairwise(edges)]
    ys = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    value, intercept = statistics.linear_regression(xs, ys)
    freedom = spans - 2
    residual = sum((y - intercept - value * x) ** 2 for x, y in zip(xs, ys, strict=True)) / freedom
    mean = statistics.fmean(xs)
    error = math.sqrt(residual / sum((x - mean) ** 2 for x in xs))
    # The largest entry that is not above: an interval a little too wide, never too narrow.
    spread = error * _T95[max(known for known in _T95 if known <= freedom)]
    return Slope(value=value, low=value - spread, high=value + spread)
