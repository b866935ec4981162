"""From outcomes to figures: pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flowroll.errors import QueueFullError

OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended.

    Attributes:
        code: "ok", or the code of the error.
        latency_s: Since it was due, waits and retries included.
        samples: Samples received.
        steps: Denoising steps of these samples.
        rejections: How often the server refused it with 429.
    """

    code: str
    latency_s: float
    samples: int = 0
    steps: int = 0
    rejections: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The figures of a run.

    Attributes:
        seconds: From the start to the last answer.
        sent: Requests; each is completed, rejected or failed.
        completed: Answered with samples.
        rejected: Refused with 429 to the end.
        failed: All others.
        rejections: Answers with 429, those of retried requests included.
        errors: Requests by the code of their error, rejected ones too.
        latency_s: p50, p90, p99 and max of completed requests; empty without any.
        per_second: Completed requests, samples, steps, and bytes of bodies.
    """

    seconds: float
    sent: int
    completed: int
    rejected: int
    failed: int
    rejections: int
    errors: dict[str, int]
    latency_s: dict[str, float]
    per_second: dict[str, float]


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank); a value that was measured.

    Args:
        ordered: Ascending, at least one.
        percent: 1 to 100.
    """
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def summarize(outcomes: Sequence[Outcome], seconds: float, received_bytes: int) -> LoadReport:
    """The report of a run."""
    done = [outcome for outcome in outcomes if outcome.code == OK]
    errors = Counter(outcome.code for outcome in outcomes if outcome.code != OK)
    ordered = sorted(outcome.latency_s for outcome in done)
    latency = (
        {f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 99)} | {"max": ordered[-1]} if ordered else {}
    )
    totals = {
        "requests": len(done),
        "samples": sum(outcome.samples for outcome in done),
        "steps": sum(outcome.steps for outcome in done),
        "bytes": received_bytes,
    }
    rejected = errors[QueueFullError.code]
    return LoadReport(
        seconds=seconds,
        sent=len(outcomes),
        completed=len(done),
        rejected=rejected,
        failed=len(outcomes) - len(done) - rejected,
        rejections=sum(outcome.rejections for outcome in outcomes),
        errors=dict(sorted(errors.items())),
        latency_s=latency,
        per_second={name: total / seconds if seconds else 0.0 for name, total in totals.items()},
    )
