"""Numbers alone: how many requests were accepted, how they ended, how full the batches were, where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, get_args

StageName: TypeAlias = Literal["queue", "encode", "denoise", "decode"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A stretch of time that a request spent in one stage.

    Attributes:
        stage: Which; one of `STAGES`, or what happens to its answer afterwards.
        start_s: Monotonic clock.
        end_s: Monotonic clock.
    """

    stage: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of one request went; the stages follow each other without a gap.

    Attributes:
        queue: Seconds until it was taken up, and from its conditioning to the first step of its first sample.
        encode: Seconds in the text encoder.
        denoise: Seconds from its first step to the last step of its last sample.
        decode: Seconds from there to the answer.
    """

    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0

    @classmethod
    def of(cls, stretches: Iterable[Stretch]) -> Timing:
        """The sums by stage; a stage that was not reached took no time."""
        totals = dict.fromkeys(STAGES, 0.0)
        for stretch in stretches:
            totals[cast(StageName, stretch.stage)] += stretch.seconds
        return cls(**totals)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """One consistent look at the requests: accepted = completed + failed + pending + running, always.

    Attributes:
        accepted: Requests taken since the start.
        completed: Of these, ended in a result.
        failed: Of these, ended in an error, or were cancelled.
        pending: Waiting now.
        running: Taken up, and not ended.
    """

    accepted: int
    completed: int
    failed: int
    pending: int
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """One consistent look at the load.

    Attributes:
        requests: How many there were, and are.
        oldest_waiting_s: Age of the request that has waited longest; 0 where none waits.
        running_samples: Samples between their initial noise and their decoded picture.
        batches: Shared forwards so far, by the number of samples in them.
        failures: Requests that ended in an error, by its code.
        stage_s: Seconds of ended requests, by stage.
        is_paused: Whether new requests are refused.
        is_holding: Whether no sample starts until a push of weights is complete.
    """

    requests: WorkerStats
    oldest_waiting_s: float
    running_samples: int
    batches: Mapping[int, int]
    failures: Mapping[str, int]
    stage_s: Mapping[StageName, float]
    is_paused: bool
    is_holding: bool

    @property
    def steps(self) -> int:
        """Denoising steps so far, of all samples."""
        return sum(samples * count for samples, count in self.batches.items())


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The running totals. Its owner's lock guards it."""

    accepted: int = 0
    completed: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    stage_s: dict[StageName, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def note_end(self, timing: Timing, failure: str | None) -> None:
        """Counts a request that ended, in an error of that code or in a result."""
        if failure is None:
            self.completed += 1
        else:
            self.failures[failure] += 1
        for stage in STAGES:
            self.stage_s[stage] += getattr(timing, stage)
