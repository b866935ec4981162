"""An accepted request, its future, and the samples that it is made of."""

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
from flowroll.errors import CancelledRequestError, DeadlineExceededError, EngineError

T = TypeVar("T")
# The stages between the moments that a request notes.
_BETWEEN: tuple[StageName, ...] = ("queue", "encode", "queue", "denoise", "decode")
# Makes the answer of a finished sample.
Finish = Callable[[RequestPlan, Finished], Any]


class RequestFuture(Future[list[T]]):
    """The answer to come of an accepted request: one entry per sample, in the order of the seeds.

    `cancel` works while the request waits; `Scheduler.cancel` at any time.

    Attributes:
        request_id: Id of the request; callers may give several requests the same.
        spans: Where the time of the request went, in order and without a gap, once it has ended.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id
        self.spans: tuple[StageSpan, ...] = ()

    @property
    def timing(self) -> Timing:
        """Where the time of the request went, by stage."""
        return Timing.of(self.spans)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """An accepted request. The loop's thread alone changes it.

    Attributes:
        id: Place in the order of acceptance; names the request on every rank.
        plan: What was asked for, with every default filled in.
        finish: Makes the answer of a sample.
        future: Receives the answers.
        accepted_s: When the request came.
        deadline_s: When it is given up; None: never.
        num_threads: CPU threads of the caller. They shape the bits, so every thread that works for the request uses as many.
        attempt: How many times the request was requeued. What an earlier attempt left behind is dropped.
        has_begun: Whether the future can no longer be cancelled by itself.
        conditioning: What its samples share, once the prompts are encoded.
        results: Answers by place in the order of the seeds.
        admitted_s: When it was admitted.
        encoded_s: When its conditioning was made.
        started_s: When its first sample started.
        denoised_s: When its last sample had its last step.
        num_denoised: How many samples had their last step.
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
    encoded_s: float | None = None
    started_s: float | None = None
    denoised_s: float | None = None
    num_denoised: int = 0

    @property
    def pixels(self) -> int:
        """Pixels of one sample."""
        return self.plan.geometry.height * self.plan.geometry.width

    @property
    def work(self) -> int:
        """What the time of the request is roughly proportional to: pixels x steps x samples."""
        return self.plan.work

    def note_denoised(self, now_s: float) -> None:
        """Notes that one more sample had its last step."""
        self.num_denoised += 1
        if self.num_denoised == len(self.plan.seeds):
            self.denoised_s = now_s

    def restart(self) -> None:
        """Puts the request back to the start, with the same seeds."""
        self.attempt += 1
        self.conditioning = None
        self.results.clear()
        self.admitted_s = self.encoded_s = self.started_s = self.denoised_s = None
        self.num_denoised = 0

    def spans(self, now_s: float) -> tuple[StageSpan, ...]:
        """Where the time of the request went if it ends now."""
        moments = (self.accepted_s, self.admitted_s, self.encoded_s, self.started_s, self.denoised_s)
        noted = [moment_s for moment_s in moments if moment_s is not None]
        return tuple(
            StageSpan(stage=stage, start_s=start_s, end_s=end_s)
            for stage, (start_s, end_s) in zip(_BETWEEN, itertools.pairwise([*noted, now_s]), strict=False)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestSample:
    """One sample of a request, as the scheduler sees it; its tensors are with the runner, under `id`.

    Attributes:
        id: Names the sample on every rank.
        request: The request that it belongs to.
        attempt: Attempt of the request for which the sample was made.
        index: Place in the order of the seeds.
    """

    id: int
    request: Request
    attempt: int
    index: int

    @property
    def is_wanted(self) -> bool:
        """Whether the request still is at the attempt that this sample was made for."""
        return self.attempt == self.request.attempt

    @property
    def seed(self) -> int:
        """Seed of the sample."""
        return self.request.plan.seeds[self.index]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningSample:
    """A sample that takes steps.

    Attributes:
        of: The sample.
        key: Samples with equal keys may share a forward.
        started_s: When it started.
    """

    of: RequestSample
    key: Hashable
    started_s: float


def end_future(future: Future[Any], outcome: Any = None, *, error: BaseException | None = None) -> None:
    """Ends a future, unless somebody else has ended it already."""
    try:
        if error is None:
            future.set_result(outcome)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass


def cancelled() -> CancelledRequestError:
    """Makes the error of a request that was aborted, or whose caller went away."""
    return CancelledRequestError("the request must be wanted to run to its end, got its cancellation; send it again.")


def too_late(seconds: float) -> DeadlineExceededError:
    """Makes the error of a request that has not ended after so many seconds, although its deadline was then."""
    return DeadlineExceededError(
        f"the request must end before its deadline, got {seconds:.1f} s without an end; allow more, or ask for less."
    )


def engine_error(error: BaseException) -> EngineError:
    """Makes what the caller may know of an unexpected failure: its kind and first line. A traceback would hold tensors."""
    reason = str(error).strip().splitlines()
    shown = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
    return EngineError(f"the engine must run the request to its end, got {shown}; see the log for the request id.")
