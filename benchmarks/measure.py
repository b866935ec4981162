"""Paired timing: every arm runs once a round, in alternating order, and ratios are taken within the round."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios of two arms, with a 95 % confidence interval by bootstrap."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4f} [{self.low:.4f}, {self.high:.4f}]"


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time, which neighbours on the machine do not shape; with several threads wall time, which shows what they gain."""
    return time.process_time if threads == 1 else time.perf_counter


def paired_times(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, by CPU time of the process unless another clock is given (see `clock_of`)."""
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else reversed(names):
            started = clock()
            arms[name]()
            seconds = clock() - started
            if number >= 0:
                times[name].append(seconds)
    return times


def ratio(numerator: list[float], denominator: list[float], *, resamples: int = 4000) -> Ratio:
    """The median paired ratio and its bootstrap interval."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(pairs, k=len(pairs))) for _ in range(resamples))
    return Ratio(statistics.median(pairs), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])


def hardware() -> str:
    """The processor, in words that say nothing about whose machine it is."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return f"{cpu}; Python {platform.python_version()}; torch {torch.__version__}"
