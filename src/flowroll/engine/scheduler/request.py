"""An accepted request, its future and its samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from flowroll.engine.outputs import Finished
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.scheduler.counters import StageName, StageSpan, Timing
from flowroll.engine.starts import PlannedSample
from flowroll.errors import CancelledRequestError, DeadlineExceededError, EngineError
from flowroll.types import StepStamp

T = TypeVar("T")
# The stages between the successive moments that a request records.
_BETWEEN: tuple[StageName, ...] = ("queue", "encode", "queue", "denoise", "decode")
# Makes the answer of a finished sample.
Finish = Callable[[RequestPlan, Finished], Any]


class RequestFuture(Future[list[T]]):
    """The future answer of an accepted request: one entry per sample, in the order of the seeds.

    Its own `cancel` works while the request waits; `Scheduler.cancel` works at any time.

    Attributes:
        request_id: The id of the request; callers may give the same id to several requests.
        spans: How the time of the request was spent, in order and without a gap; empty until the request has ended.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id
        self.spans: tuple[StageSpan, ...] = ()

    @property
    def timing(self) -> Timing:
        """How the time of the request was spent, by stage."""
        return Timing.of(self.spans)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """An accepted request. Only the loop's thread changes it.

    Attributes:
        id: Its position in the order of acceptance; it identifies the request on every rank.
        plan: The planned request, with every default filled in.
        finish: Makes the answer of a finished sample.
        future: The future that receives the answers.
        accepted_s: When the request arrived, in monotonic seconds, as are all times below.
        deadline_s: When the request fails if it has not ended; None: never.
        num_threads: The number of CPU threads of the caller. Bits depend on it, so every thread that works for the request
            uses this number.
        attempt: The number of the attempt, which grows when the request is requeued or ends, or must be encoded again. Work for
            an earlier attempt is dropped.
        has_begun: Whether the future's own `cancel` no longer works.
        conditioning: The data that its samples share; None until the request is admitted and its prompts are encoded.
        results: The answers so far, by the place of their sample.
        admitted_s: When the request was admitted.
        encoding_s: When it was admitted or its encoding was begun, whichever came first; None until it is encoded.
        encoded_s: When its conditioning was complete.
        started_s: When its first sample started.
        denoised_s: When its last sample took its last step.
        num_denoised: The number of samples that took their last step.
    """

    id: int
    plan: RequestPlan
    finish: Finish
    future: RequestFuture[Any]
    accepted_s: float
    deadline_s: float | None
    num_threads: int = field(default_factory=torch.get_num_threads)
    attempt: int = 0
    has_begun: bool = False
    conditioning: Conditioning | None = None
    results: dict[int, Any] = field(default_factory=dict)
    admitted_s: float | None = None
    encoding_s: float | None = None
    encoded_s: float | None = None
    started_s: float | None = None
    denoised_s: float | None = None
    num_denoised: int = 0

    @property
    def pixels(self) -> int:
        """The number of pixels of one sample."""
        return self.plan.geometry.height * self.plan.geometry.width

    @property
    def work(self) -> int:
        """The amount of work, to which the request's time is roughly proportional: pixels x steps x samples."""
        return self.plan.work

    def resembles(self, other: Request) -> bool:
        """Returns whether samples of both are likely to share forwards, as far as it is known before they are encoded."""
        return self.num_threads == other.num_threads and self.plan.geometry == other.plan.geometry

    def note_encoded(self, started_s: float, now_s: float) -> None:
        """Notes that the request was encoded from `started_s` on, which may have been before it was admitted."""
        self.encoding_s = started_s if self.admitted_s is None else min(self.admitted_s, started_s)
        self.encoded_s = now_s

    def note_denoised(self, now_s: float) -> None:
        """Notes that one more sample took its last step."""
        self.num_denoised += 1
        if self.num_denoised == self.plan.num_answers:
            self.denoised_s = now_s

    def restart(self) -> None:
        """Resets the request to its start, with the same seeds, as a new attempt."""
        self.attempt += 1
        self.conditioning = None
        self.results.clear()
        self.admitted_s = self.encoding_s = self.encoded_s = self.started_s = self.denoised_s = None
        self.num_denoised = 0

    def spans(self, now_s: float) -> tuple[StageSpan, ...]:
        """Returns how the time of the request was spent if it ends at `now_s`."""
        encoding_s = self.admitted_s if self.encoding_s is None else self.encoding_s
        moments = (self.accepted_s, encoding_s, self.encoded_s, self.started_s, self.denoised_s)
        noted = [moment_s for moment_s in moments if moment_s is not None]
        return tuple(
            StageSpan(stage=stage, start_s=start_s, end_s=end_s)
            for stage, (start_s, end_s) in zip(_BETWEEN, itertools.pairwise([*noted, now_s]), strict=False)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestSample:
    """One sample of a request, as the scheduler sees it. The runner holds its tensors, under `id`.

    Attributes:
        id: Identifies the sample on every rank.
        request: The request that it belongs to.
        attempt: The attempt of the request for which the sample was made.
        planned: What the sample is drawn from.
        parent: The sample whose child it is; None if it starts by itself.
    """

    id: int
    request: Request
    attempt: int
    planned: PlannedSample
    parent: RunningSample | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the request is still in the attempt that this sample was made for."""
        return self.attempt == self.request.attempt

    @property
    def index(self) -> int:
        """The place of its answer among the request's answers."""
        return self.planned.index


@dataclass(slots=True, kw_only=True, eq=False)
class RunningSample:
    """A sample that takes steps. Only the loop's thread changes it.

    Attributes:
        of: The sample of the request.
        key: The batch key: samples with equal keys may share a forward.
        started_s: When the sample, or the one that it descends from, started, in monotonic seconds.
        first_step: When the sample, or the one that it descends from, took its first step; None before that.
        last_step: When it took its last step; None before that.
    """

    of: RequestSample
    key: Hashable
    started_s: float
    first_step: StepStamp | None = None
    last_step: StepStamp | None = None


def end_future(future: Future[Any], outcome: Any = None, *, error: BaseException | None = None) -> None:
    """Ends a future with an outcome or an error, unless it has ended already."""
    try:
        if error is None:
            future.set_result(outcome)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass


def cancelled() -> CancelledRequestError:
    """Makes the error of a request that was aborted, or whose caller disconnected."""
    return CancelledRequestError("the request must be wanted to run to its end, got its cancellation; send it again.")


def too_late(seconds: float) -> DeadlineExceededError:
    """Makes the error of a request that had not ended at its deadline, after this number of seconds."""
    return DeadlineExceededError(
        f"the request must end before its deadline, got {seconds:.1f} s without an end; allow more, or ask for less."
    )


def engine_error(error: BaseException) -> EngineError:
    """Makes the error that a caller gets for an unexpected failure, with its class and first line.

    The traceback is left out, because it would hold tensors.
    """
    reason = str(error).strip().splitlines()
    shown = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
    return EngineError(f"the engine must run the request to its end, got {shown}; see the log for the request id.")
