"""The scheduler's loop: one thread owns the state of all requests and does one piece of work per turn.

    take messages -> expire -> admit -> a control task, or: start samples and take one shared step -> publish -> end futures

The loop neither waits nor locks. Encoding and decoding run in stages beside it, which report to its inbox.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import torch

from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome
from flowroll.engine.scheduler.ahead import EncodedAhead
from flowroll.engine.scheduler.counters import LoadStats, View
from flowroll.engine.scheduler.inbox import Inbox
from flowroll.engine.scheduler.policy import BatchLimits, Gathering, Watchdog
from flowroll.engine.scheduler.queue import RequestQueue
from flowroll.engine.scheduler.request import Request, RequestSample, RunningSample, cancelled, end_future
from flowroll.engine.scheduler.retry import Throughput
from flowroll.engine.scheduler.samples import RunningSamples
from flowroll.engine.scheduler.stages import Stage, decoding, encoding
from flowroll.engine.scheduler.tasks import ControlTask, ExclusiveMode, PauseMode, TaskQueue
from flowroll.errors import FlowrollError, PausedError, fresh
from flowroll.types import StepStamp

_log = logging.getLogger(__name__)


class Loop:
    """Holds the state of a scheduler and does its work, one turn at a time.

    Args:
        runner: Runs the model.
        limits: The limits of what runs at the same time.
        inbox: The inbox that messages are taken from.
        encoder: The stage that encodes prompts.
        decoder: The stage that decodes samples.
        clock: Returns the monotonic time in seconds.

    Attributes:
        view: What other threads may know of the loop.
        watchdog: Knows how long recent work took.
        stopped: The reason why requests are no longer accepted; None while they are.
        is_halted: Whether the loop's thread must end.
    """

    def __init__(
        self, runner: Executor, limits: BatchLimits, inbox: Inbox, *, encoder: Stage, decoder: Stage, clock: Callable[[], float]
    ) -> None:
        self._runner, self._limits, self._inbox = runner, limits, inbox
        self._encoder, self._decoder, self._clock = encoder, decoder, clock
        self._queue = RequestQueue(clock, self._release)
        self._tasks = TaskQueue()
        self._samples = RunningSamples(limits)
        self._ahead = EncodedAhead(limits)
        # The admitted request that is being encoded; None if there is none.
        self._encoding: Request | None = None
        # How much the encode stage has to do, also for requests that have ended or that wait.
        self._num_encoding = 0
        self._gathering = Gathering()
        # Until when the next step waits for others to join it; None if it does not.
        self._gathers_until_s: float | None = None
        # The policy whose weights are in place; None: those that the engine was last given, which all tasks are about.
        self._policy: str | None = None
        self._pause: PauseMode | None = None
        self._is_holding = False
        # Futures of callers, with the results that they get at the end of this turn.
        self._answers: list[tuple[Future[Any], Any]] = []
        # After a control task, samples take a step before the next task, however many tasks wait.
        self._owes_step = False
        self._exclusive_thread: int | None = None
        self.watchdog = Watchdog()
        self._throughput = Throughput()
        self.view = View()
        self.stopped: FlowrollError | None = None
        self.is_halted = False

    @property
    def is_in_exclusive_task(self) -> bool:
        """Whether the calling thread runs a control task that needs idleness."""
        return self._exclusive_thread == threading.get_ident()

    def turn(self) -> bool:
        """Takes the messages that arrived, then does one piece of work; returns whether there was anything to do."""
        # On the loop's own thread gradients are off already; entering `torch.no_grad` again would cost 15 us.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return self._turn()

    def _turn(self) -> bool:
        owed, self._owes_step = self._owes_step, False
        has_worked = self._take_messages() or owed
        task = None
        if not owed and (self._policy is None or self._put_default_back()):
            task = self._tasks.next(self._clock(), is_idle=self.is_idle(), is_holding=self._is_holding)
        if task is None:
            has_worked |= self._start_samples()
        # Published before the work, which may take long, so that other threads see what runs, and again after it.
        self._publish()
        self._deliver_ends()
        if task is None:
            has_worked |= self._step()
        else:
            self._owes_step = has_worked = True
            self._run_task(task)
        self._publish()
        self._deliver_ends()
        return has_worked

    def settle(self) -> None:
        """Takes the messages that arrived, without any work on the model."""
        self._take_messages()
        self._publish()
        self._deliver_ends()

    def _deliver_ends(self) -> None:
        """Ends the futures of all that has ended. The counters are published before, so a caller finds its own end counted."""
        answers, self._answers = self._answers, []
        for answer, value in answers:
            end_future(answer, value)
        self._queue.deliver_ends()
        self._tasks.deliver_ends()

    def _take_messages(self) -> bool:
        """Handles all messages, expires what is due, and admits requests; returns whether there was a message."""
        has_taken = False
        for message in self._inbox.take_all():
            message(self)
            has_taken = True
        self._queue.expire()
        self._tasks.expire(self._clock())
        self._admit()
        return has_taken

    def idle_s(self) -> float | None:
        """Returns for how many seconds there is nothing to do unless a message arrives; None: without a limit."""
        moments = (self._queue.next_deadline_s(), self._tasks.next_deadline_s(), self._gathers_until_s)
        deadlines = [moment_s for moment_s in moments if moment_s is not None]
        return max(min(deadlines) - self._clock(), 0.0) if deadlines else None

    def fail_all(self, error: FlowrollError) -> None:
        """Ends every request and task in this error, and refuses those that arrive later."""
        self.stopped = self.stopped or error
        for request in list(self._queue):
            self._queue.fail(request, fresh(error))
        self._tasks.fail_all(lambda: fresh(error))
        self._publish()
        self._deliver_ends()

    # What messages call, on the loop's thread

    def accept(self, request: Request) -> None:
        """Accepts a new request."""
        self._queue.accept(request)
        if self.stopped is not None:
            self._queue.fail(request, fresh(self.stopped))

    def cancel(self, future: Future[Any]) -> None:
        """Cancels a request or a task, because its caller no longer wants it."""
        self._cancel(lambda request: request.future is future, lambda task: task.future is future)

    def abort(self, request_id: str | None, answer: Future[int], *, keep_partial: bool = False) -> None:
        """Ends all requests with this id, or all requests if it is None; the answer is their number.

        Args:
            request_id: The id.
            answer: The future of the number.
            keep_partial: Whether requests of which samples are finished end in these.
        """
        count = self._cancel(
            lambda request: request_id in (None, request.plan.request_id),
            lambda task: request_id in (None, task.request_id),
            keep_partial=keep_partial,
        )
        self._answers.append((answer, count))

    def pause(self, mode: PauseMode | None, answer: Future[None]) -> None:
        """Admits no more requests; those that run finish, or freeze before their next step. The mode None ends the pause."""
        self._pause = mode
        self._answers.append((answer, None))

    def hold(self, is_holding: bool) -> None:
        """Admits no requests while `is_holding` is set. Running requests go on."""
        self._is_holding = is_holding

    def halt(self) -> None:
        """Ends the loop's thread after this turn."""
        self.is_halted = True

    def _cancel(
        self,
        is_meant: Callable[[Request], bool],
        is_task_meant: Callable[[ControlTask], bool],
        *,
        keep_partial: bool = False,
    ) -> int:
        meant = [request for request in self._queue if is_meant(request)]
        for request in meant:
            if keep_partial and request.results:
                self._queue.complete_partly(request)
            else:
                self._queue.fail(request, cancelled())
        return len(meant) + self._tasks.cancel(is_task_meant)

    def take_task(self, task: ControlTask, mode: ExclusiveMode) -> None:
        """Accepts a control task; `mode` says what happens to running requests if it needs that none runs."""
        if self.stopped is not None:
            end_future(task.future, error=fresh(self.stopped))
            return
        if task.needs_idle:
            self._encode_again()
        if task.needs_idle and mode == "abort":
            self._queue.requeue(list(self._queue.running))
        elif task.needs_idle and self._pause == "freeze" and self._queue.num_running:
            rule = "requests must go on to finish first, got frozen ones; continue, or abort them."
            end_future(task.future, error=PausedError(rule))
            return
        self._tasks.add(task)
        if task.is_newer and mode != "abort":
            self._end_stale()

    def _end_stale(self) -> None:
        """Ends the running requests that the versions which wait for them would make older than they allow.

        Those that have not taken a step wait for these versions.
        """
        unstarted = []
        for request in list(self._queue.running):
            try:
                self._runner.check_recent(request.plan, coming=self._tasks.num_newer)
            except FlowrollError as error:
                if request.started_s is None:
                    unstarted.append(request)
                else:
                    self._queue.fail(request, error)
        self._queue.requeue(unstarted)

    def _encode_again(self) -> None:
        """Forgets what was encoded ahead, since the model may change before these requests are admitted."""
        for request in self._ahead.clear():
            request.restart()

    def take_encoded(
        self, request: Request, attempt: int, outcome: Conditioning | BaseException, started_s: float | None = None
    ) -> None:
        """Takes what the encode stage made of a request.

        Args:
            request: The request.
            attempt: The attempt of it that was encoded.
            outcome: Its conditioning, or the error.
            started_s: When its encoding began; None: it was skipped.
        """
        self._num_encoding -= 1
        self._note_piece(started_s)
        if request.attempt != attempt:
            return
        if isinstance(outcome, BaseException):
            self._queue.fail(request, outcome)
            return
        assert started_s is not None
        request.note_encoded(started_s, self._clock())
        if not self._ahead.keep(request, outcome):
            self._encoding = None
            self._add(request, outcome)

    def _add(self, request: Request, conditioning: Conditioning) -> None:
        """Lets the samples of an admitted request wait to start."""
        try:
            self._runner.add_request(request.id, conditioning)
        except BaseException as error:
            self._queue.fail(request, error)
            return
        request.conditioning = conditioning
        self._samples.add_ready(request)

    def take_decoded(self, sample: RequestSample, outcome: Any = None, started_s: float | None = None) -> None:
        """Takes what the decode stage made of a sample.

        Args:
            sample: The sample.
            outcome: Its answer, or the error.
            started_s: When its decoding began; None: it was skipped, because it is no longer wanted.
        """
        request = sample.request
        self._samples.end_decoding(request)
        self._note_piece(started_s)
        if not sample.is_wanted:
            return
        if isinstance(outcome, BaseException):
            self._queue.fail(request, outcome)
            return
        request.results[sample.index] = outcome
        if len(request.results) == request.plan.num_answers:
            self._note_completion(request)
            self._queue.complete(request)

    def _note_completion(self, request: Request) -> None:
        oldest = next(iter(self._queue.running))
        assert oldest.admitted_s is not None
        self._throughput.note_end(request.work, busy_since_s=oldest.admitted_s, now_s=self._clock())

    def _may_encode(self) -> bool:
        """Returns whether waiting requests may be encoded at all."""
        return (
            self._pause is None
            and not self._is_holding
            and self.stopped is None
            and not self._tasks.needs_idle
            and not (self._policy is not None and self._tasks.has_any)
        )

    def _has_room(self) -> bool:
        """Returns whether the next request may be admitted: a sample of it can start once its prompts are encoded."""
        first = self._queue.first_waiting
        policy, pixels = (None, 0) if first is None else (first.plan.held_policy, first.pixels)
        return (
            self._may_encode()
            and self._encoding is None
            and self._samples.has_room(pixels)
            # Requests of another policy wait until nothing runs, and so does whatever is behind them.
            and (policy == self._policy or self._may_exchange())
        )

    def _may_exchange(self) -> bool:
        """Returns whether no work is under way that depends on the weights in place."""
        return self.is_idle() and self._tasks.current is None

    def _admit(self) -> None:
        """Admits waiting requests, and has others encoded that wait."""
        while self._queue.num_waiting and self._has_room():
            request = self._queue.admit(self._policy, may_exchange=self._may_exchange())
            if request is None:
                return
            try:
                self._put_in_place(request.plan.held_policy)
            except Exception as error:
                self._queue.fail(request, error)
                continue
            is_begun = request in self._ahead
            conditioning = self._ahead.take(request)
            if conditioning is not None:
                self._add(request, conditioning)
                continue
            self._encoding = request
            if not is_begun:
                self._encode(request)
        if self._may_encode():
            self._encode_ahead()

    def _encode_ahead(self) -> None:
        """Has waiting requests encoded in their order, so that their samples can start together when there is room.

        Where samples share no forward, nothing is gained by that, and one encoding at most gets in the way of a step.
        """
        for request in self._queue.waiting:
            if request in self._ahead:
                continue
            if request.plan.held_policy != self._policy or not self._ahead.has_room:
                return
            if self._num_encoding and not self._runner.shares_forwards:
                return
            self._ahead.begin(request)
            self._encode(request)

    def _encode(self, request: Request) -> None:
        self._num_encoding += 1
        self._encoder.submit(encoding(self._runner, self._inbox, request, self._clock))

    def _put_in_place(self, policy: str | None) -> None:
        if policy != self._policy:
            started_s = self._clock()
            self._runner.put_in_place(policy)
            self._policy = policy
            self._note_piece(started_s)

    def _put_default_back(self) -> bool:
        """Puts the weights back that the engine was last given, if a task waits for them; returns whether it may begin."""
        if not (self._tasks.has_any and self.is_idle()):
            return False
        self._put_in_place(None)
        return True

    def is_idle(self) -> bool:
        """Returns whether no work is under way for any request, not even for one that has ended."""
        return not (self._queue.num_running or self._num_encoding or self._samples.num_decoding)

    def _release(self, request: Request) -> None:
        """Drops what every rank holds for a request. Samples that are being decoded leave memory when that has ended."""
        self._ahead.take(request)
        if request is self._encoding:
            self._encoding = None
        self._samples.drop(request)
        if request.conditioning is not None:
            try:
                self._runner.drop_request(request.id)
            except FlowrollError:  # a rank is lost, and the engine ends anyway
                _log.debug("a request could not be dropped on every rank", exc_info=True)

    def _run_task(self, task: ControlTask) -> None:
        started_s = self._clock()
        if task.pieces is None and not task.future.set_running_or_notify_cancel():
            self._tasks.end(task, error=cancelled())
            return
        self._exclusive_thread = threading.get_ident() if task.needs_idle else None
        self._runner.use_threads(task.num_threads)
        try:
            is_done, result = task.advance()
        except BaseException as error:
            self._end_task(task, error=error)
        else:
            if is_done:
                self._end_task(task, result)
        finally:
            self._exclusive_thread = None
            self._note_piece(started_s)

    def _end_task(self, task: ControlTask, result: Any = None, *, error: BaseException | None = None) -> None:
        # The task's own action may have ended the task already.
        if self._tasks.current is task:
            self._tasks.end(task, result, error=error)

    def _start_samples(self) -> bool:
        """Starts the samples that the limits admit; returns whether there were any."""
        has_started = False
        while self._pause != "freeze" and (sample := self._samples.next_start()) is not None:
            self._start(sample)
            has_started = True
        return has_started

    def _start(self, sample: RequestSample) -> None:
        request, started_s = sample.request, self._clock()
        self._runner.use_threads(request.num_threads)
        parent, outcome = sample.parent, StepOutcome()
        try:
            if parent is None:
                key = self._runner.start_sample(sample.id, request.id, sample.planned)
            else:
                key, outcome = self._runner.start_child(sample.id, request.id, sample.planned, parent.of.id)
        except BaseException as error:
            self._queue.fail(request, error)
            return
        request.started_s = started_s if request.started_s is None else request.started_s
        running = RunningSample(of=sample, key=key, started_s=started_s)
        if parent is not None:
            running.started_s, running.first_step = parent.started_s, parent.first_step
        self._samples.run(running)
        self._note_piece(started_s)
        self._take_outcomes([running], {**outcome.finished, **outcome.failures})

    def _step(self) -> bool:
        """Takes one shared step of the samples whose turn it is; returns whether it did."""
        self._gathers_until_s = None
        if self._pause == "freeze":
            return False
        self._gathers_until_s = self._gather()
        if self._gathers_until_s is not None:
            return False
        key, batch = self._samples.next_batch()
        if not batch:
            return False
        self._runner.use_threads(batch[0].of.request.num_threads)
        started_s = self._clock()
        for running in batch:
            running.first_step = running.first_step or self._stamp(running)
        outcomes = self._samples.step(self._runner, key, batch)
        self._note_piece(started_s, running_pixels=self._samples.pixels_in_memory)
        self._gathering.note_step(self._clock() - started_s)
        self._queue.counters.batches[len(batch)] += 1
        self._take_outcomes(batch, outcomes)
        return True

    def _gather(self) -> float | None:
        """Returns until when the next step waits for a request that is being encoded and may share its forward, or None."""
        request, sample = self._encoding, self._samples.next_with_room()
        if request is None or sample is None or not self._runner.shares_forwards or not request.resembles(sample.of.request):
            return None
        steps = 1 if sample.first_step is not None else len(sample.of.request.plan.steps)
        return self._gathering.until_s(request.id, steps=steps, now_s=self._clock())

    def _take_outcomes(self, batch: Sequence[RunningSample], outcomes: Mapping[int, Sample | BaseException]) -> None:
        ended: list[tuple[RunningSample, Sample]] = []
        for running in batch:
            outcome = outcomes.get(running.of.id)
            # Checked for each sample, because the failure of one sample drops the others of its request.
            if outcome is None or not running.of.is_wanted:
                continue
            if isinstance(outcome, BaseException):
                self._queue.fail(running.of.request, outcome)
            elif outcome.is_at_fork:
                self._samples.fork(running)
            else:
                ended.append((running, outcome))
        for index, (running, sample) in enumerate(ended):
            self._decode(running, sample, ended[index + 1 :])

    def _decode(self, running: RunningSample, sample: Sample, following: Sequence[tuple[RunningSample, Sample]]) -> None:
        request = running.of.request
        running.last_step = self._stamp(running)
        self._samples.begin_decoding(running)
        request.note_denoised(self._clock())
        self._decoder.submit(decoding(self._runner, self._inbox, running, sample, self._clock, following))

    def _stamp(self, running: RunningSample) -> StepStamp:
        conditioning = running.of.request.conditioning
        assert conditioning is not None
        return self._runner.stamp(conditioning)

    def _note_piece(self, started_s: float | None, *, running_pixels: int = 0) -> None:
        """Notes that a piece of work that began at `started_s` has ended; None: no work was done."""
        if started_s is not None:
            self.watchdog.note_piece(started_s, self._clock(), running_pixels=running_pixels)

    def _publish(self) -> None:
        counters, tasks = self._queue.counters, self._tasks
        stats = LoadStats(
            requests=self._queue.counts(),
            log_probs=tasks.counts(),
            oldest_waiting_since_s=self._queue.oldest_waiting_since_s,
            running_samples=self._samples.num_in_memory,
            batches=dict(counters.batches),
            failures=dict(counters.failures),
            stage_s=dict(counters.stage_s),
            is_paused=self._pause is not None,
        )
        oldest = next(iter(self._queue.running), None)
        self.view = View(
            has_room=self._has_room(),
            work_ahead=self._queue.work_ahead,
            seconds_per_work=self._throughput.seconds_per_work,
            stats=stats,
            running_since_s=None if oldest is None else oldest.admitted_s,
            running_pixels=self._samples.pixels_in_memory,
            task_since_s=None if tasks.current is None else tasks.current_since_s,
        )
