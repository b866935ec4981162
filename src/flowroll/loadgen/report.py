"""From outcomes to figures: pure. Of each request a few numbers are kept, never its answer."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OK = "ok"
REJECTED = 429
_PERCENTS = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended.

    Attributes:
        status: Of the answer; None: there was none.
        code: "ok", the code of the error, or the name of what broke the connection.
        latency_s: From when it was due to the last byte, waits and retries included.
        samples: Samples received.
        steps: Denoising steps of these samples.
        received_bytes: Of bodies, those of refusals included.
        rejections: How often the server refused it with 429.
        stages: Seconds by stage, where the server tells them.
    """

    status: int | None
    code: str
    latency_s: float
    samples: int = 0
    steps: int = 0
    received_bytes: int = 0
    rejections: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The figures of a run.

    Attributes:
        seconds: From the start to the last answer.
        sent: Requests; each is completed, rejected or failed.
        completed: Answered with the samples that it asked for.
        rejected: Refused with 429 to the end.
        failed: All others.
        rejections: Answers with 429, those of retried requests included.
        errors: Requests by the status and the code of their error, rejected ones too.
        latency_s: p50, p90, p99 and max of completed requests; empty without any.
        stages_s: The same by stage, and its mean; empty where the server does not tell.
        per_second: Completed requests, samples, steps, and bytes of all bodies.
    """

    seconds: float
    sent: int
    completed: int
    rejected: int
    failed: int
    rejections: int
    errors: dict[str, int]
    latency_s: dict[str, float]
    stages_s: dict[str, dict[str, float]]
    per_second: dict[str, float]


class Tally:
    """Takes outcomes one by one; what it keeps of a request is its latency, its stages and a few sums."""

    def __init__(self) -> None:
        self.completed = self.failed = 0
        self._rejected = self._rejections = 0
        self._totals: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._latency_s = array("d")
        self._stages_s: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))

    def add(self, outcome: Outcome) -> None:
        """Counts one request."""
        self._rejections += outcome.rejections
        self._totals.update(samples=outcome.samples, steps=outcome.steps, bytes=outcome.received_bytes)
        if outcome.code != OK:
            self._errors[f"{outcome.status or 'no answer'} {outcome.code}"] += 1
            if outcome.status == REJECTED:
                self._rejected += 1
            else:
                self.failed += 1
            return
        self.completed += 1
        self._latency_s.append(outcome.latency_s)
        for stage, seconds in outcome.stages.items():
            self._stages_s[stage].append(seconds)

    def report(self, seconds: float) -> LoadReport:
        """The figures of all that was counted in so many seconds."""
        totals = {"requests": self.completed, **{name: self._totals[name] for name in ("samples", "steps", "bytes")}}
        return LoadReport(
            seconds=seconds,
            sent=self.completed + self._rejected + self.failed,
            completed=self.completed,
            rejected=self._rejected,
            failed=self.failed,
            rejections=self._rejections,
            errors=dict(sorted(self._errors.items())),
            latency_s=_distribution(self._latency_s),
            stages_s={
                stage: {"mean": sum(values) / len(values)} | _distribution(values) for stage, values in self._stages_s.items()
            },
            per_second={name: total / seconds if seconds else 0.0 for name, total in totals.items()},
        )


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank); a value that was measured.

    Args:
        ordered: Ascending, at least one.
        percent: 1 to 100.
    """
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def _distribution(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {f"p{percent}": percentile(ordered, percent) for percent in _PERCENTS} | {"max": ordered[-1]}
