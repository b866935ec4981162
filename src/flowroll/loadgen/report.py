"""Computes the figures of a run from the outcomes of its requests, which are a few numbers each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OK = "ok"
REJECTED = 429
_PERCENTS = (50, 90, 99)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Tells how one request ended. It is filled in while the answer arrives.

    Attributes:
        status: HTTP status of the answer; None where there was no answer.
        code: "ok", the code of the error, or the name of the exception that broke the connection.
        latency_s: Seconds from when the request was due to the last byte of its answer, waits and retries included.
        samples: Number of samples received.
        steps: Denoising steps of these samples.
        received_bytes: Bytes of all bodies received, those of refusals included.
        rejections: How often the server refused the request with 429.
        retry_after_s: How long the server wants its caller to wait.
        stages: Seconds by stage, where the server tells them.
    """

    status: int | None = None
    code: str = OK
    latency_s: float = 0.0
    samples: int = 0
    steps: int = 0
    received_bytes: int = 0
    rejections: int = 0
    retry_after_s: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The figures of a run.

    Attributes:
        seconds: Seconds from the start to the last answer.
        sent: Number of requests; each of them is completed, rejected or failed.
        completed: Requests that were answered with the samples that they asked for.
        rejected: Requests whose last answer was 429.
        failed: All other requests.
        rejections: Answers with 429, those of retried requests included.
        errors: Number of requests by the status and the code of their error, rejected ones included.
        latency_s: p50, p90, p99 and max of completed requests; empty if there are none.
        stages_s: The same and the mean, by stage; empty where the server does not tell.
        per_second: Completed requests, samples, steps, and bytes of all bodies, per second.
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


def summarize(outcomes: Sequence[Outcome], seconds: float) -> LoadReport:
    """Returns the figures of these requests, which took so many seconds together."""
    completed = [outcome for outcome in outcomes if outcome.code == OK]
    rejected = sum(outcome.status == REJECTED for outcome in outcomes)
    errors = Counter(f"{outcome.status or 'no answer'} {outcome.code}" for outcome in outcomes if outcome.code != OK)
    stages: dict[str, list[float]] = {}
    for outcome in completed:
        for stage, stage_s in outcome.stages.items():
            stages.setdefault(stage, []).append(stage_s)
    totals = {
        "requests": len(completed),
        "samples": sum(outcome.samples for outcome in outcomes),
        "steps": sum(outcome.steps for outcome in outcomes),
        "bytes": sum(outcome.received_bytes for outcome in outcomes),
    }
    return LoadReport(
        seconds=seconds,
        sent=len(outcomes),
        completed=len(completed),
        rejected=rejected,
        failed=len(outcomes) - len(completed) - rejected,
        rejections=sum(outcome.rejections for outcome in outcomes),
        errors=dict(sorted(errors.items())),
        latency_s=_percentiles([outcome.latency_s for outcome in completed]),
        stages_s={stage: {"mean": sum(values) / len(values)} | _percentiles(values) for stage, values in stages.items()},
        per_second={name: total / seconds if seconds else 0.0 for name, total in totals.items()},
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Returns percentiles by nearest rank: the smallest measured value that so many percent of all do not exceed."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{percent}": math.ceil(len(ordered) * percent / 100) for percent in _PERCENTS}
    return {name: ordered[rank - 1] for name, rank in ranks.items()} | {"max": ordered[-1]}
