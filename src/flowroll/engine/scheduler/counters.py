"""Numbers about requests: how many were accepted, how they ended, how full batches were, and how time was spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, get_args

StageName: TypeAlias = Literal["queue", "encode", "denoise", "decode"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpan:
    """A span of time that a request spent in one stage.

    Attributes:
        stage: One of `STAGES`, or the name of what a server does with the answer afterwards.
        start_s: The start of the span in seconds of the monotonic clock.
        end_s: The end of the span in seconds of the monotonic clock.
    """

    stage: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """The length of the span in seconds."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How the time of one request was spent, by stage. The stages follow each other without a gap.

    Attributes:
        queue: The seconds until the request was admitted, or its encoding begun, plus those from its conditioning to its first
            sample's first step.
        encode: The seconds in the text encoder.
        denoise: The seconds from its first step to the last step of its last sample.
        decode: The seconds from the last step to the answer.
    """

    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0

    @classmethod
    def of(cls, spans: Iterable[StageSpan]) -> Timing:
        """Sums the spans by stage. A stage that was not reached has 0 seconds."""
        totals = dict.fromkeys(STAGES, 0.0)
        for span in spans:
            totals[cast(StageName, span.stage)] += span.seconds
        return cls(**totals)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """The numbers of requests at one moment. Always accepted = completed + failed + pending + running.

    Attributes:
        accepted: The number of requests accepted since the start.
        completed: The number of requests that ended in a result.
        failed: The number of requests that ended in an error or were cancelled.
        pending: The number of requests that wait now.
        running: The number of requests that were admitted and have not ended.
    """

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    pending: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """The load at one moment. The loop makes it in each turn.

    Attributes:
        requests: The numbers of requests for samples.
        log_probs: The numbers of requests to recompute log-probs; none of them counts as running.
        oldest_waiting_since_s: When the request that has waited longest arrived, in monotonic seconds; None if none waits.
        running_samples: The number of samples between their initial noise and their decoded picture.
        batches: The number of forwards so far, by the number of samples in them.
        failures: The number of requests that ended in an error, by the error's code.
        stage_s: The seconds that ended requests have spent, by stage.
        is_paused: Whether no request is admitted until generation is resumed.
        is_holding: Whether no request is admitted until a push of weights is complete.
    """

    requests: RequestCounts = field(default_factory=RequestCounts)
    log_probs: RequestCounts = field(default_factory=RequestCounts)
    oldest_waiting_since_s: float | None = None
    running_samples: int = 0
    batches: Mapping[int, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    stage_s: Mapping[StageName, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    is_paused: bool = False
    is_holding: bool = False

    @property
    def steps(self) -> int:
        """The number of denoising steps so far, summed over samples."""
        return sum(samples * count for samples, count in self.batches.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What other threads may know of the loop: one immutable object, which the loop replaces as a whole.

    Attributes:
        has_room: Whether the next request would be admitted immediately.
        work_ahead: The amount of work of the requests that wait, and half of those that run.
        seconds_per_work: The seconds that the engine takes for a unit of work; None if no request has completed yet.
        stats: The load at that moment.
        running_since_s: When the oldest running request was admitted, in monotonic seconds; None if none runs.
        running_pixels: The number of pixels of all samples in memory.
        task_since_s: When the current control task was begun, in monotonic seconds; None if there is none.
    """

    has_room: bool = True
    work_ahead: float = 0.0
    seconds_per_work: float | None = None
    stats: LoadStats = field(default_factory=LoadStats)
    running_since_s: float | None = None
    running_pixels: int = 0
    task_since_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Counters:
    """The running totals of a scheduler. Only its loop writes them."""

    accepted: int = 0
    completed: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    stage_s: dict[StageName, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def note_end(self, timing: Timing, failure: str | None) -> None:
        """Counts a request that ended in an error with the code `failure`, or in a result if that is None."""
        if failure is None:
            self.completed += 1
        else:
            self.failures[failure] += 1
        for stage in STAGES:
            self.stage_s[stage] += getattr(timing, stage)
