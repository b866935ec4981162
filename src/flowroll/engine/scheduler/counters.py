"""Numbers about requests: how many were accepted, how they ended, how full the batches were, where the time went."""

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
        stage: One of `STAGES`, or what a server does with the answer afterwards.
        start_s: Monotonic clock.
        end_s: Monotonic clock.
    """

    stage: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of one request went. The stages follow each other without a gap.

    Attributes:
        queue: Seconds until the request was admitted, and from its conditioning to the first step of its first sample.
        encode: Seconds in the text encoder.
        denoise: Seconds from its first step to the last step of its last sample.
        decode: Seconds from there to the answer.
    """

    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0

    @classmethod
    def of(cls, spans: Iterable[StageSpan]) -> Timing:
        """Sums the spans by stage; a stage that was not reached took no time."""
        totals = dict.fromkeys(STAGES, 0.0)
        for span in spans:
            totals[cast(StageName, span.stage)] += span.seconds
        return cls(**totals)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """One consistent view of the requests: accepted = completed + failed + pending + running, always.

    Attributes:
        accepted: Requests taken since the start.
        completed: Requests that ended in a result.
        failed: Requests that ended in an error or were cancelled.
        pending: Requests that wait now.
        running: Requests that were admitted and have not ended.
    """

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    pending: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """One consistent view of the load, made by the loop at the end of a turn.

    Attributes:
        requests: How many requests there were and are.
        log_probs: How many requests to recompute log-probs there were and are; none of them counts as running.
        oldest_waiting_since_s: Monotonic time at which the request that has waited longest came; None where none waits.
        running_samples: Samples between their initial noise and their decoded picture.
        batches: Shared forwards so far, by the number of samples in them.
        failures: Requests that ended in an error, by the error's code.
        stage_s: Seconds of ended requests, by stage.
        is_paused: Whether new requests are refused.
        is_holding: Whether no sample starts until a push of weights is complete.
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
        """Denoising steps so far, of all samples."""
        return sum(samples * count for samples, count in self.batches.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What other threads may know of the loop: one immutable object, replaced as a whole.

    Attributes:
        num_taken: Submitted requests that the loop has taken from its inbox, since the start.
        num_waiting: Requests that wait in the queue.
        has_room: Whether the next request would be admitted at once.
        free_at_s: When a place in the queue is expected to be free; None: nothing is known.
        stats: The load.
        running_since_s: When the oldest running request was admitted; None: none runs.
        running_pixels: Pixels of all samples in memory.
        task_since_s: When the control task that is being done was begun; None: there is none.
    """

    num_taken: int = 0
    num_waiting: int = 0
    has_room: bool = True
    free_at_s: float | None = None
    stats: LoadStats = field(default_factory=LoadStats)
    running_since_s: float | None = None
    running_pixels: int = 0
    task_since_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Counters:
    """The running totals of a scheduler. Its loop alone writes them."""

    accepted: int = 0
    completed: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    stage_s: dict[StageName, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def note_end(self, timing: Timing, failure: str | None) -> None:
        """Counts a request that ended in an error of that code, or in a result."""
        if failure is None:
            self.completed += 1
        else:
            self.failures[failure] += 1
        for stage in STAGES:
            self.stage_s[stage] += getattr(timing, stage)
