"""The scheduler's interface for callers: it accepts, cancels and pauses requests, and runs control tasks on the model.

A caller puts a message into the inbox and gets a future. The only state that callers share is a count of what they have put
in, so that a full queue refuses a request immediately, however long the loop's current step takes.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import torch

from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.executor import Executor
from flowroll.engine.scheduler.counters import LoadStats
from flowroll.engine.scheduler.inbox import Inbox, Message
from flowroll.engine.scheduler.loop import Loop
from flowroll.engine.scheduler.policy import BatchLimits
from flowroll.engine.scheduler.request import Finish, Request, RequestFuture, end_future, engine_error
from flowroll.engine.scheduler.retry import RetrySchedule
from flowroll.engine.scheduler.stages import Stage
from flowroll.engine.scheduler.tasks import ControlTask, ExclusiveMode, PauseMode
from flowroll.errors import FlowrollError, PausedError, QueueFullError, fresh
from flowroll.heap import trim_heap
from flowroll.openmp import release_team

_log = logging.getLogger(__name__)
T = TypeVar("T")
# For so long nothing has come when the heap is trimmed.
_QUIET_S = 1.0


class Scheduler:
    """Runs the requests of one engine. Each request ends in exactly one result or one error.

    Its threads start with `start`, and end when the scheduler is no longer referenced.

    Args:
        runner: Runs the model.
        limits: The limits of what runs at the same time.
        encoder: The stage that encodes prompts; None: a thread of its own.
        decoder: The stage that decodes samples; None: a thread of its own.
        clock: Returns the monotonic time in seconds.

    Attributes:
        limits: The limits of what runs at the same time.
    """

    def __init__(
        self,
        runner: Executor,
        limits: BatchLimits,
        *,
        encoder: Stage | None = None,
        decoder: Stage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._inbox = Inbox()
        # It refers to the inbox alone, so that the threads keep no engine alive.
        tell = functools.partial(_tell_of_death, self._inbox)
        self._stages = (encoder or Stage("flowroll-encode", tell), decoder or Stage("flowroll-decode", tell))
        self.loop = Loop(runner, limits, self._inbox, encoder=self._stages[0], decoder=self._stages[1], clock=clock)
        for stage in self._stages:
            weakref.finalize(self.loop, stage.stop)
        weakref.finalize(self.loop, self._inbox.put, Loop.halt)
        self._thread: threading.Thread | None = None
        self._stopped: FlowrollError | None = None
        self._pause: PauseMode | None = None
        self._is_holding = False
        self._is_refusing = True
        self._num_submitted = 0
        self._submitting = threading.Lock()
        self._retries = RetrySchedule()
        # The futures that have not ended; they are ended from outside if the loop cannot do it.
        self._open: dict[Future[Any], None] = {}

    def submit(
        self, plan: RequestPlan, finish: Finish, *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> RequestFuture[Any]:
        """Accepts a planned request. May be called from any thread.

        Args:
            plan: The planned request.
            finish: Makes the answer of each finished sample.
            timeout_s: The request fails if it has not ended after this many seconds; None: no limit.
            max_waiting: The request is refused if this number of requests waits; None: no limit.

        Returns:
            A future that ends in one answer per sample, or in a `FlowrollError`.

        Raises:
            PausedError: Generation is paused and refuses requests: `pause` was called, and `resume` was not.
            QueueFullError: Too many requests wait.
            FlowrollError: The scheduler was stopped; it is the error that `stop` was called with.
        """
        now_s = self._clock()
        future: RequestFuture[Any] = RequestFuture(plan.request_id)
        deadline_s = None if timeout_s is None else now_s + timeout_s
        with self._submitting:
            self._check_open()
            if self._pause is not None and self._is_refusing:
                raise PausedError("generation must not be paused to take a request, got a pause; continue it first.")
            self._check_queue(plan.work, max_waiting, now_s)
            request = Request(
                id=self._num_submitted, plan=plan, finish=finish, future=future, accepted_s=now_s, deadline_s=deadline_s
            )
            self._num_submitted += 1
            self._put(lambda loop: loop.accept(request), future)
        return future

    def cancel(self, future: Future[Any]) -> None:
        """Ends a request in a `CancelledRequestError` after the current step; also a request to recompute log-probs."""
        self._inbox.put(lambda loop: loop.cancel(future))

    def abort(self, request_id: str | None, *, keep_partial: bool = False) -> Future[int]:
        """Ends the requests with this id, or all if it is None, also those to recompute log-probs; gives their number.

        Args:
            request_id: The id.
            keep_partial: Whether requests of which samples are finished end in these. All others are cancelled.
        """
        answer: Future[int] = Future()
        self._put(lambda loop: loop.abort(request_id, answer, keep_partial=keep_partial), answer)
        return answer

    def pause(self, mode: PauseMode, *, refuses: bool = True) -> Future[None]:
        """Admits none of the requests that wait until `resume`, and refuses new ones immediately.

        Args:
            mode: What happens to running requests: they "finish", or they "freeze" before their next step.
            refuses: Whether new requests are refused; otherwise they are accepted and wait.

        Returns:
            A future that ends when the current step has ended.

        Raises:
            FlowrollError: The scheduler was stopped; it is the error that `stop` was called with.
        """
        self._check_open()
        self._is_refusing = refuses
        return self._set_pause(mode)

    def resume(self) -> Future[None]:
        """Ends a `pause`; the future ends when the loop has resumed."""
        return self._set_pause(None)

    def _set_pause(self, mode: PauseMode | None) -> Future[None]:
        self._pause = mode
        answer: Future[None] = Future()
        self._put(lambda loop: loop.pause(mode, answer), answer)
        return answer

    def hold_starts(self, is_holding: bool) -> None:
        """Stops admitting requests, or admits them again. New requests are accepted and wait; running requests go on.

        Requests to recompute log-probs are held in the same way. If it is called within an `exclusive` action, or before that
        is submitted, no request can be admitted between the two.
        """
        self._is_holding = is_holding
        self._inbox.put(lambda loop: loop.hold(is_holding))

    def exclusive(
        self,
        action: Callable[[], Any],
        *,
        mode: ExclusiveMode = "drain",
        is_newer: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Runs an action on the model while no request runs. May be called from any thread.

        Waiting requests go on waiting meanwhile, and no trajectory is computed partly before and partly after the action.

        Args:
            action: The action, which is called on the loop's thread. If it returns a generator, that is advanced in pieces, and
                what it returns is the result; no request runs between the pieces either.
            mode: "drain": running requests finish first. "abort": running requests are requeued with the same seeds and start
                again from their beginning afterwards.
            is_newer: Whether weights of a newer version are in place afterwards. Running requests that these would make older
                than they allow end in an `OutdatedWeightsError`, and are not waited for.
            request_id: See `between_steps`.
            timeout_s: See `between_steps`.

        Returns:
            A future that ends in what the action returns or raises, or in a `PausedError` if running requests are frozen,
            since they would never finish.

        Raises:
            FlowrollError: The scheduler was stopped; it is the error that `stop` was called with.
        """
        task = ControlTask(action=action, needs_idle=True, is_newer=is_newer, request_id=request_id)
        return self._do(task, timeout_s, mode)

    def between_steps(self, action: Callable[[], Any], *, request_id: str | None = None, timeout_s: float | None = None) -> Any:
        """Runs an action on the model between two steps.

        Args:
            action: The action, which is called on the loop's thread. If it returns a generator, the generator is advanced
                between steps, and what it returns is the result.
            request_id: The id of a request to recompute log-probs, which is counted, and which `cancel` and `abort` can end.
                None: any other action, for which neither is true.
            timeout_s: The action fails if it has not ended after this many seconds; None: no limit.

        Returns:
            A future of the result.

        Raises:
            FlowrollError: The scheduler was stopped; it is the error that `stop` was called with.
        """
        return self._do(ControlTask(action=action, needs_idle=False, request_id=request_id), timeout_s)

    def load(self) -> LoadStats:
        """Returns the load that the loop published last, all numbers from one moment; only `is_holding` is from now."""
        return replace(self.loop.view.stats, is_holding=self._is_holding)

    def oldest_waiting_s(self) -> float:
        """Returns for how many seconds the first waiting request has waited; 0 if none waits."""
        since_s = self.load().oldest_waiting_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def is_progressing(self) -> bool:
        """Returns whether a request or a task runs and is not stuck, by the durations of recent work."""
        view, now_s, watchdog = self.loop.view, self._clock(), self.loop.watchdog
        if view.task_since_s is not None:
            return not watchdog.is_task_stuck(view.task_since_s, now_s)
        if view.running_since_s is None:
            return False
        return self._pause == "freeze" or not watchdog.is_stuck(view.running_since_s, now_s, view.running_pixels)

    @property
    def is_in_exclusive_task(self) -> bool:
        """Whether the calling thread runs an `exclusive` action."""
        return self.loop.is_in_exclusive_task

    @property
    def stopped(self) -> FlowrollError | None:
        """The reason why requests are no longer accepted; None while they are."""
        return self._stopped

    @property
    def is_alive(self) -> bool:
        """Whether the threads run."""
        return self._thread is not None and self._thread.is_alive() and all(stage.is_alive for stage in self._stages)

    def start(self) -> None:
        """Starts the threads, unless they run already or the scheduler was stopped."""
        with self._submitting:
            if self._thread is not None or self._stopped is not None:
                return
            for stage in self._stages:
                stage.start()
            # The thread holds no reference to the loop while it waits, so that an unreferenced engine can be garbage collected.
            arguments = (weakref.ref(self.loop), self._inbox, weakref.WeakMethod(self._crash))
            self._thread = threading.Thread(target=_drive, name="flowroll-loop", args=arguments, daemon=True)
            self._thread.start()

    def stop(self, error: FlowrollError, *, patience_s: float | None = None) -> None:
        """Ends every request and task in this error, and refuses new ones. The result of the current step is dropped.

        Args:
            error: The error that requests and tasks end in.
            patience_s: After this many seconds the calling thread ends the futures, since the loop may be in a collective that
                never returns. None: do not wait for the loop.
        """
        with self._submitting:
            self._stopped = self._stopped or error
        self._inbox.put(lambda loop: loop.fail_all(error))
        if self._thread is None:
            self.loop.settle()
        elif patience_s is not None:
            self._give_up(patience_s)

    def halt(self, timeout_s: float | None = None) -> bool:
        """Ends the threads after their current work. `start` can start new ones.

        Args:
            timeout_s: How long to wait for the threads, in seconds; None: no limit.

        Returns:
            Whether all threads have ended; False also if the calling thread is the loop's own.
        """
        if self._thread is None:
            return True
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

        def left_s() -> float | None:
            return None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)

        if threading.current_thread() is self._thread:
            return False
        for stage in self._stages:
            stage.stop()
        self._inbox.put(Loop.halt)
        self._thread.join(left_s())
        has_ended = not self._thread.is_alive()
        has_ended &= all([stage.join(left_s()) for stage in self._stages])
        if not has_ended:
            if self._stopped is not None:
                self._give_up(0.0)
            return False
        self._thread = None
        self.loop.is_halted = False
        return True

    def _crash(self, error: BaseException) -> None:
        """Ends everything after an error in the loop itself, which is a defect, so that no caller waits forever.

        It is called on the loop's thread.
        """
        _log.error("the engine's loop cannot go on", exc_info=error)
        stopped = engine_error(error)
        with self._submitting:
            self._stopped = self._stopped or stopped
        self.loop.fail_all(stopped)
        self.loop.settle()

    def _give_up(self, patience_s: float) -> None:
        """Ends the futures that the loop has not ended within this time after a stop."""
        assert self._stopped is not None
        deadline_s = time.monotonic() + patience_s
        while self._open and time.monotonic() < deadline_s:
            time.sleep(0.01)
        for future in list(self._open):
            end_future(future, error=fresh(self._stopped))

    def _do(self, task: ControlTask, timeout_s: float | None, mode: ExclusiveMode = "drain") -> Future[Any]:
        task.accepted_s = self._clock()
        task.deadline_s = None if timeout_s is None else task.accepted_s + timeout_s
        with self._submitting:
            self._check_open()
            self._put(lambda loop: loop.take_task(task, mode), task.future)
        return task.future

    def _put(self, message: Message, future: Future[Any]) -> None:
        # Whoever hands over work is about to wait for it.
        release_team()
        self._open[future] = None
        future.add_done_callback(lambda ended: self._open.pop(ended, None) and None)
        self._inbox.put(message)

    def _check_open(self) -> None:
        if self._stopped is not None:
            raise fresh(self._stopped)

    def _check_queue(self, work: int, max_waiting: int | None, now_s: float) -> None:
        view = self.loop.view
        # If there is room, one of the waiting requests is about to be admitted and is not counted.
        requests = view.stats.requests
        waiting = requests.pending + self._num_submitted - requests.accepted - view.has_room
        if max_waiting is None or waiting < max_waiting:
            if max_waiting is None or waiting < max_waiting / 2:
                self._retries.clear()
            return
        since_s, pace = view.stats.oldest_waiting_since_s, view.seconds_per_work
        if pace is None:
            # Nothing has ended yet, but it is known for how long something waits.
            pace = 0.0 if since_s is None else (now_s - since_s) / max(view.work_ahead, 1.0)
        retry_s = self._retries.after_s(ahead_s=pace * view.work_ahead, own_s=pace * work, now_s=now_s)
        rule = f"the queue must have a free place to take a request, got {waiting} waiting"
        raise QueueFullError(f"{rule}; try again in {retry_s:.0f} s.", retry_after_s=retry_s)


def _tell_of_death(inbox: Inbox, error: BaseException) -> None:
    """Makes the loop go on no more, because the thread of a stage has died of this error."""

    def die(loop: Loop) -> None:
        # Whoever drives the loop ends everything with this reason, as after an error of the loop's own.
        raise error

    inbox.put(die)


def _drive(held: weakref.ref[Loop], inbox: Inbox, crash: weakref.WeakMethod[Callable[[BaseException], None]]) -> None:
    # In torch this is a setting of each thread; it holds for all work of the loop's thread.
    torch.set_grad_enabled(False)
    is_trimmed = True
    while (loop := held()) is not None and not loop.is_halted:
        try:
            has_worked = loop.turn()
            is_trimmed = is_trimmed and not has_worked
            may_trim = not is_trimmed and loop.is_idle()
            idle_s = 0.0 if has_worked else loop.idle_s()
            del loop
            if idle_s == 0.0:
                continue
            release_team()
            if may_trim:
                idle_s = _QUIET_S if idle_s is None else min(idle_s, _QUIET_S)
            if not inbox.wait(idle_s) and may_trim:
                trim_heap()
                is_trimmed = True
        except BaseException as error:
            if (end_all := crash()) is not None:
                end_all(error)
            return
