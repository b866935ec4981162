"""The callers' side of the scheduler: requests come in, are cancelled, paused, drained; control tasks are done to the model.

A caller puts a message into the inbox and gets a future. The one thing that callers share is a count of what they have put in,
so that a full queue refuses at once, however long the loop's step takes.
"""

from __future__ import annotations

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
from flowroll.engine.scheduler import inbox as messages
from flowroll.engine.scheduler.counters import LoadStats
from flowroll.engine.scheduler.inbox import Inbox, PauseMode
from flowroll.engine.scheduler.loop import Loop
from flowroll.engine.scheduler.policy import BatchLimits, Watchdog
from flowroll.engine.scheduler.request import Finish, Request, RequestFuture, end_future, engine_error
from flowroll.engine.scheduler.runner import Runner
from flowroll.engine.scheduler.stages import Stage, ThreadStage
from flowroll.engine.scheduler.tasks import ControlTask, ExclusiveMode
from flowroll.errors import FlowrollError, PausedError, QueueFullError, fresh

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Scheduler:
    """Runs the requests of one engine: each ends in exactly one result or one error.

    Its threads start with the first call that needs them, and end when nobody holds the scheduler any more.

    Args:
        runner: Runs the model.
        limits: How much runs at once.
        encoder: The stage that encodes prompts.
        decoder: The stage that decodes samples.
        clock: Monotonic seconds.

    Attributes:
        limits: How much runs at once.
    """

    def __init__(
        self,
        runner: Runner,
        limits: BatchLimits,
        *,
        encoder: Stage | None = None,
        decoder: Stage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._inbox = Inbox()
        self._stages = (encoder or ThreadStage("flowroll-encode"), decoder or ThreadStage("flowroll-decode"))
        self.loop = Loop(runner, limits, self._inbox, encoder=self._stages[0], decoder=self._stages[1], clock=clock)
        for stage in self._stages:
            weakref.finalize(self.loop, stage.stop)
        weakref.finalize(self.loop, self._inbox.put, messages.Halt())
        self._thread: threading.Thread | None = None
        self._stopped: FlowrollError | None = None
        self._pause: PauseMode | None = None
        self._is_holding = False
        self._num_submitted = 0
        self._submitting = threading.Lock()
        # Futures that have not ended, in case the loop cannot end them.
        self._open: dict[Future[Any], None] = {}

    def submit(
        self, plan: RequestPlan, finish: Finish, *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> RequestFuture[Any]:
        """Takes a planned request; may be called from any thread.

        Args:
            plan: The request.
            finish: Makes the answer of each of its samples.
            timeout_s: The request is given up when it has not ended after so long; None: never.
            max_waiting: The request is refused where so many wait; None: never.

        Returns:
            Ends in one answer per sample, or in a `FlowrollError`.

        Raises:
            PausedError: Between `pause` and `resume`.
            QueueFullError: Too many requests wait.
            FlowrollError: What `stop` was called with.
        """
        now_s = self._clock()
        future: RequestFuture[Any] = RequestFuture(plan.request_id)
        deadline_s = None if timeout_s is None else now_s + timeout_s
        with self._submitting:
            self._check_open()
            if self._pause is not None:
                raise PausedError("generation must not be paused to take a request, got a pause; continue it first.")
            self._check_queue(max_waiting, now_s)
            request = Request(
                id=self._num_submitted, plan=plan, finish=finish, future=future, accepted_s=now_s, deadline_s=deadline_s
            )
            self._num_submitted += 1
            self._put(messages.Submit(request), future)
        return future

    def cancel(self, future: Future[Any]) -> None:
        """Ends a request, also one to recompute log-probs, in a `CancelledRequestError`, after the step that is being taken."""
        self._inbox.put(messages.Cancel(future))

    def abort(self, request_id: str | None) -> Future[int]:
        """Cancels the requests of this id, or all; the future tells how many there were."""
        answer: Future[int] = Future()
        self._put(messages.Abort(request_id, answer), answer)
        return answer

    def pause(self, mode: PauseMode) -> Future[None]:
        """Refuses new requests at once, and admits none of those that wait, until `resume`.

        Args:
            mode: What becomes of those that run: they "finish", or "freeze" at their next step.

        Returns:
            Ends when the step that was being taken has ended.

        Raises:
            FlowrollError: What `stop` was called with.
        """
        self._check_open()
        return self._set_pause(mode)

    def resume(self) -> Future[None]:
        """Goes on after `pause`; the future ends when the loop does."""
        return self._set_pause(None)

    def _set_pause(self, mode: PauseMode | None) -> Future[None]:
        self._pause = mode
        answer: Future[None] = Future()
        self._put(messages.Pause(mode, answer), answer)
        return answer

    def hold_starts(self, is_holding: bool) -> None:
        """Keeps requests that wait from being admitted, or lets them go on. New ones are taken, and wait; what runs goes on.

        Requests to recompute log-probs are treated in the same way. Called in an `exclusive` action, or before it is asked
        for, it leaves no gap in which a sample could start.
        """
        self._is_holding = is_holding
        self._inbox.put(messages.Hold(is_holding))

    def exclusive(self, action: Callable[[], T], *, mode: ExclusiveMode = "drain") -> Future[T]:
        """Has something done to the model while no request runs; may be called from any thread.

        Requests that wait go on waiting meanwhile, and no trajectory sees the model before and after.

        Args:
            action: Runs on the loop's thread.
            mode: "drain": what runs finishes first. "abort": what runs is requeued with the same seeds and is
                done again, wholly, afterwards.

        Returns:
            Ends in what the action returns or raises, or in a `PausedError`: frozen requests would never finish.

        Raises:
            FlowrollError: What `stop` was called with.
        """
        return self._do(ControlTask(action=action, needs_idle=True), mode)

    def between_steps(self, action: Callable[[], Any], *, request_id: str | None = None, timeout_s: float | None = None) -> Any:
        """Has something done with the model between two steps.

        Args:
            action: Runs on the loop's thread; if it returns a generator, that is advanced between steps, and what it returns
                is the result.
            request_id: Counts it as a request to recompute log-probs, which `cancel` and `abort` can end; None: neither.
            timeout_s: It is given up when it has not ended after so long; None: never.

        Returns:
            A future of the result.

        Raises:
            FlowrollError: What `stop` was called with.
        """
        now_s = self._clock()
        deadline_s = None if timeout_s is None else now_s + timeout_s
        task = ControlTask(action=action, needs_idle=False, request_id=request_id, accepted_s=now_s, deadline_s=deadline_s)
        return self._do(task, "drain")

    def load(self) -> LoadStats:
        """The load at the end of the loop's last turn, all numbers from the same moment; whether it holds is as of now."""
        return replace(self.loop.view.stats, is_holding=self._is_holding)

    def oldest_waiting_s(self) -> float:
        """How long the first request in line has waited; 0 where none waits."""
        since_s = self.load().oldest_waiting_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def is_progressing(self) -> bool:
        """Whether a request or a task runs, and it has not been silent for much longer than recent work explains."""
        view, now_s, watchdog = self.loop.view, self._clock(), self.loop.watchdog
        if view.task_since_s is not None:
            return not watchdog.is_task_stuck(view.task_since_s, now_s)
        if view.running_since_s is None:
            return False
        return self._pause == "freeze" or not watchdog.is_stuck(view.running_since_s, now_s, view.running_pixels)

    @property
    def is_in_exclusive_task(self) -> bool:
        """Whether the calling thread is in an `exclusive` action."""
        return self.loop.is_in_exclusive_task

    @property
    def stopped(self) -> FlowrollError | None:
        """Why nothing is accepted any more; None: requests are taken."""
        return self._stopped

    @property
    def is_alive(self) -> bool:
        """Whether the threads run."""
        return self._thread is not None and self._thread.is_alive() and all(stage.is_alive for stage in self._stages)

    def start(self) -> None:
        """Starts the threads, unless they run."""
        with self._submitting:
            if self._thread is not None or self._stopped is not None:
                return
            for stage in self._stages:
                stage.start()
            # The thread must not hold the loop while it sleeps, so that an engine that nobody holds can be collected.
            arguments = (weakref.ref(self.loop), self._inbox, weakref.WeakMethod(self._crash))
            self._thread = threading.Thread(target=_drive, name="flowroll-loop", args=arguments, daemon=True)
            self._thread.start()

    def stop(self, error: FlowrollError, *, patience_s: float | None = None) -> None:
        """Ends every request and task in this error, and refuses new ones; what the model is at is dropped when it ends.

        Args:
            error: The reason.
            patience_s: After so long the futures are ended from here: the loop may be in a collective that never returns.
                None: do not wait.
        """
        with self._submitting:
            self._stopped = self._stopped or error
        self._inbox.put(messages.Stop(error))
        if self._thread is None:
            self.loop.settle()
        elif patience_s is not None:
            self._give_up(patience_s)

    def halt(self, timeout_s: float | None = None) -> bool:
        """Ends the threads after what they are at; False: one is still at it after so long. `start` starts others."""
        if self._thread is None:
            return True
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

        def left_s() -> float | None:
            return None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)

        if threading.current_thread() is self._thread:
            return False
        for stage in self._stages:
            stage.stop()
        self._inbox.put(messages.Halt())
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
        """Ends everything with the reason, instead of letting it wait for ever; called on the loop's thread, by a defect."""
        _log.error("the engine's loop cannot go on", exc_info=error)
        stopped = engine_error(error)
        with self._submitting:
            self._stopped = self._stopped or stopped
        self.loop.fail_all(stopped)
        self.loop.settle()

    def _give_up(self, patience_s: float) -> None:
        """Ends what the loop does not end, where everything was told of the end."""
        assert self._stopped is not None
        deadline_s = time.monotonic() + patience_s
        while self._open and time.monotonic() < deadline_s:
            time.sleep(0.01)
        for future in list(self._open):
            end_future(future, error=fresh(self._stopped))

    def _do(self, task: ControlTask, mode: ExclusiveMode) -> Future[Any]:
        with self._submitting:
            self._check_open()
            self._put(messages.Do(task, mode), task.future)
        return task.future

    def _put(self, message: messages.Message, future: Future[Any]) -> None:
        self._open[future] = None
        future.add_done_callback(lambda ended: self._open.pop(ended, None) and None)
        self._inbox.put(message)

    def _check_open(self) -> None:
        if self._stopped is not None:
            raise fresh(self._stopped)

    def _check_queue(self, max_waiting: int | None, now_s: float) -> None:
        view = self.loop.view
        # Where there is room, one of those that wait is on its way into the engine.
        waiting = view.num_waiting + self._num_submitted - view.num_taken - view.has_room
        if max_waiting is not None and waiting >= max_waiting:
            retry_s = Watchdog.retry_after_s(view.free_at_s, now_s)
            rule = f"the queue must have a free place to take a request, got {waiting} waiting"
            raise QueueFullError(f"{rule}; try again in {retry_s:.0f} s.", retry_after_s=retry_s)


def _drive(held: weakref.ref[Loop], inbox: Inbox, crash: weakref.WeakMethod[Callable[[BaseException], None]]) -> None:
    # A thread's own setting in torch, for all that it does.
    torch.set_grad_enabled(False)
    while (loop := held()) is not None and not loop.is_halted:
        try:
            idle_s = 0.0 if loop.turn() else loop.idle_s()
            del loop
            if idle_s != 0.0:
                inbox.wait(idle_s)
        except BaseException as error:
            if (end_all := crash()) is not None:
                end_all(error)
            return
