"""The callers' side: requests come in, are cancelled, paused, drained; the model is taken aside for errands.

The way of a request: it waits; it is taken up and its prompts are encoded; its samples become ready, start as there is room,
take steps that they share with others, and are decoded; its future ends. An errand that aborts puts it back to the start.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from flowroll.engine.batching.book import cancelled
from flowroll.engine.batching.errands import Errand, ExclusiveMode
from flowroll.engine.batching.floor import Floor, PauseMode
from flowroll.engine.batching.jobs import Accepted, Finish, Job
from flowroll.engine.batching.ledger import LoadStats
from flowroll.engine.batching.limits import BatchLimits
from flowroll.engine.batching.lines import DecodeLine, EncodeLine, Line, StepLine, Work
from flowroll.engine.batching.steps import Steps, engine_error
from flowroll.engine.batching.threads import LineThread
from flowroll.engine.plan import RequestPlan
from flowroll.errors import FlowrollError, InvalidRequestError, PausedError, QueueFullError, fresh

T = TypeVar("T")
# The lines by the names of their attributes.
_LINES = ("encoding", "stepping", "decoding")
_log = logging.getLogger(__name__)


class Batcher:
    """Runs the requests of one engine: each ends in exactly one result or one error.

    Three lines of work, each with a thread of its own once `start` was called. Without threads somebody calls their `work`, as
    tests do.

    Args:
        work: Encodes and decodes.
        limits: How much runs at once.
        steps: Takes the steps.
        max_running_requests: How many are taken up at once; None: as many as there is room for.
        clock: Monotonic seconds.

    Attributes:
        encoding: One request's prompts per call.
        stepping: One shared step per call: the denoising loop.
        decoding: One finished sample per call.
    """

    def __init__(
        self,
        work: Work,
        limits: BatchLimits,
        *,
        steps: Steps | None = None,
        max_running_requests: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._floor = Floor(limits, max_running_requests=max_running_requests, clock=clock)
        self._num_accepted = 0
        self.encoding = EncodeLine(self._floor, work)
        self._steps = steps or Steps()
        self.stepping = StepLine(self._floor, work, self._steps)
        self.decoding = DecodeLine(self._floor, work)
        self._threads: dict[str, LineThread] = {}
        self._floor.wake = self._wake

    def submit(
        self, plan: RequestPlan, finish: Finish, *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> Accepted[Any]:
        """Takes a planned request; may be called from any thread.

        Args:
            plan: The request.
            finish: Makes the answer of each of its samples.
            timeout_s: It is given up when it has not ended after so long; None: never.
            max_waiting: It is refused where so many wait; None: never.

        Returns:
            Ends in one answer per sample, or in a `FlowrollError`.

        Raises:
            PausedError: Between `pause` and `resume`.
            QueueFullError: Too many wait.
            FlowrollError: What `stop` was called with.
        """
        with self._floor.change():
            self._floor.check_running()
            if self._floor.pause is not None:
                raise PausedError("generation must not be paused to take a request, got a pause; continue it first.")
            now_s, waiting = self._clock(), self._floor.book.num_waiting
            if max_waiting is not None and waiting >= max_waiting and (waiting or not self._floor.has_room()):
                retry_s = self._floor.pace.retry_after_s(self._floor.book.running, now_s)
                rule = f"the queue must have a free place to take a request, got {waiting} waiting"
                raise QueueFullError(f"{rule}; try again in {retry_s:.0f} s.", retry_after_s=retry_s)
            job = Job(
                number=self._num_accepted,
                plan=plan,
                finish=finish,
                future=Accepted(plan.request_id),
                accepted_s=now_s,
                deadline_s=None if timeout_s is None else now_s + timeout_s,
            )
            self._num_accepted += 1
            self._floor.book.accept(job)
        return job.future

    def cancel(self, accepted: Accepted[Any]) -> bool:
        """Ends a request in a `CancelledRequestError`; its samples leave at the next step. False: it has ended already."""
        with self._floor.change():
            return bool(self._cancel_where(lambda job: job.future is accepted))

    def abort(self, request_id: str | None) -> int:
        """Cancels the requests of this id, or all; returns how many there were."""
        with self._floor.change():
            return self._cancel_where(lambda job: request_id is None or job.plan.request_id == request_id)

    def pause(self, mode: PauseMode) -> None:
        """Refuses new requests and takes up none of those that wait, until `resume`.

        Args:
            mode: What becomes of those that run: they "finish", or "freeze" at their next step.

        Raises:
            InvalidRequestError: Frozen ranks would take each other for dead.
            FlowrollError: What `stop` was called with.
        """
        if mode == "freeze" and not self._steps.can_freeze:
            raise InvalidRequestError("mode must be finish with several ranks, got freeze; use finish.", field="mode")
        with self._floor.change():
            self._floor.check_running()
            self._floor.pause = mode

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._floor.change():
            self._floor.pause = None

    def hold_starts(self, is_holding: bool) -> None:
        """Keeps requests that wait from being taken up, or lets them go on. New ones are taken, and wait; what runs goes on.

        Called in an `exclusive` action, or before it is asked for, it leaves no gap in which a sample could start.
        """
        with self._floor.change():
            self._floor.is_holding = is_holding

    def exclusive(self, action: Callable[[], T], *, mode: ExclusiveMode = "drain", yields: bool = False) -> Future[T]:
        """Has something done to the model while no request runs; may be called from any thread.

        Those that wait go on waiting meanwhile, and no trajectory sees the model before and after.

        Args:
            action: Runs on the loop's thread.
            mode: "drain": what runs finishes first. "abort": what runs is put back to the start, with the same seeds, and is
                done again, wholly, afterwards.
            yields: Whether a request that waits goes between it and the next that yields, so that a stream of them starves
                nobody.

        Returns:
            What the action returns or raises.

        Raises:
            PausedError: Frozen requests would never finish.
            FlowrollError: What `stop` was called with.
        """
        with self._floor.change():
            self._floor.check_running()
            if mode == "abort":
                self._floor.book.put_back()
            elif self._floor.pause == "freeze" and self._floor.book.num_running:
                raise PausedError("requests must go on to finish first, got frozen ones; continue, or abort them.")
            return self._add_errand(action, needs_rest=True, yields=yields)

    def between_steps(self, action: Callable[[], T]) -> Future[T]:
        """Has something done with the model as soon as the step that is being taken has ended.

        Raises:
            FlowrollError: What `stop` was called with.
        """
        with self._floor.change():
            self._floor.check_running()
            return self._add_errand(action, needs_rest=False)

    def load(self) -> LoadStats:
        """The numbers, all from the same moment."""
        with self._floor.look():
            ledger = self._floor.book.ledger
            return LoadStats(
                requests=self._floor.book.stats(),
                oldest_waiting_s=self._floor.book.oldest_waiting_s(),
                running_samples=self._floor.samples.num_in_memory,
                batches=dict(ledger.batches),
                failures=dict(ledger.failures),
                stage_s=dict(ledger.stage_s),
                is_paused=self._floor.pause is not None,
                is_holding=self._floor.is_holding,
            )

    def is_progressing(self) -> bool:
        """Whether a request or an errand runs now, and it has not been silent for much longer than recent work explains."""
        with self._floor.look():
            floor, now_s = self._floor, self._clock()
            if (since_s := floor.errands.current_since_s) is not None:
                return not floor.pace.is_errand_stuck(since_s, now_s)
            oldest = next(iter(floor.book.running), None)
            if oldest is None:
                return False
            assert oldest.taken_s is not None
            return floor.pause == "freeze" or not floor.pace.is_stuck(oldest.taken_s, now_s, floor.samples.running_pixels)

    @property
    def is_alone(self) -> bool:
        """Whether the calling thread is in an `exclusive` action."""
        return self.stepping.is_alone

    @property
    def stopped(self) -> FlowrollError | None:
        """What `stop` was called with; None: it was not."""
        return self._floor.stopped

    @property
    def is_alive(self) -> bool:
        """Whether the threads run."""
        return bool(self._threads) and all(thread.is_alive for thread in self._threads.values())

    def start(self) -> None:
        """Starts the threads, unless they run; without them somebody has to call `work` of all three lines."""
        with self._floor.look():
            if self._threads or self._floor.stopped is not None:
                return
            # By name: a thread must not hold the batcher while it sleeps.
            self._threads = {
                name: LineThread(f"flowroll-{name}", self, operator.attrgetter(name), Batcher.crash) for name in _LINES
            }

    def stop(self, error: FlowrollError) -> None:
        """Ends every request and errand in this error, and refuses new ones; what the model is at is dropped when it ends."""
        with self._floor.change():
            self._floor.stopped = self._floor.stopped or error
            for job in list(self._floor.book):
                self._floor.book.fail(job, fresh(error))
            errands = self._floor.errands.clear()
        for errand in errands:
            if errand.future.set_running_or_notify_cancel():
                errand.future.set_exception(fresh(error))

    def crash(self, error: BaseException) -> None:
        """A thread cannot go on, by a defect of ours: everything ends with the reason instead of waiting for ever."""
        _log.error("the engine's threads cannot go on", exc_info=error)
        self.stop(engine_error(error))

    def halt(self, timeout_s: float | None = None) -> bool:
        """Ends the threads after what they are at; False: one is still at it after so long. `start` starts others."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads.values():
            thread.stop()
        for thread in self._threads.values():
            if not thread.is_current:
                thread.join(None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0))
        if any(thread.is_alive for thread in self._threads.values()):
            self._give_up()
            return False
        self._threads = {}
        self.stepping.let_go()
        return True

    def _give_up(self) -> None:
        """Ends an errand that hangs, where everything else has been told of the end."""
        with self._floor.change():
            stopped = self.stopped
            hanging = None if stopped is None else self._floor.errands.give_up()
        if stopped is not None and hanging is not None:
            hanging.future.set_exception(fresh(stopped))

    def _wake(self) -> None:
        for name, thread in self._threads.items():
            line: Line = getattr(self, name)
            # A thread looks again by itself after whatever it did.
            if line.may_work() and not thread.is_current:
                thread.wake()

    def _cancel_where(self, is_meant: Callable[[Job], bool]) -> int:
        meant = [job for job in self._floor.book if is_meant(job)]
        for job in meant:
            self._floor.book.fail(job, cancelled())
        return len(meant)

    def _add_errand(self, action: Callable[[], T], *, needs_rest: bool, yields: bool = False) -> Future[T]:
        errand = Errand(action=action, needs_rest=needs_rest, yields=yields)
        self._floor.errands.add(errand)
        return errand.future
