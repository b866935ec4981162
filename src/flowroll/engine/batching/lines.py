"""The three lines of work: prompts are encoded, shared steps are taken, pictures are decoded.

Each does one piece of work per call of `work`, on whatever thread calls it: one of its own (threads.py), or a test's. An error
in a piece of work ends the request that it was for, never the line.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from flowroll.engine.batching.errands import Errand
from flowroll.engine.batching.floor import Floor
from flowroll.engine.batching.jobs import RunningSample
from flowroll.engine.batching.samples import Start
from flowroll.engine.batching.steps import Steps
from flowroll.engine.denoising import DenoisingTask, Sample
from flowroll.engine.finishing import Finished
from flowroll.engine.plan import RequestPlan
from flowroll.errors import FlowrollError


@runtime_checkable
class Work(Protocol):
    """What is done for a request or a sample besides its steps, by whoever holds the model."""

    @property
    def device(self) -> torch.device:
        """Of the model."""

    def encode(self, plan: RequestPlan) -> DenoisingTask:
        """The request's conditioning and schedule."""

    def decode(self, task: DenoisingTask, sample: Sample) -> Tensor:
        """A finished sample's picture, on the CPU."""


def no_grad() -> AbstractContextManager[object]:
    """Without gradients; nothing where they are off already, as on the lines' own threads: torch's way there costs 15 us."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class Line:
    """One line of work.

    Args:
        floor: What the lines share.
        work: Encodes and decodes.
    """

    def __init__(self, floor: Floor, work: Work) -> None:
        self._floor, self._work = floor, work

    def work(self) -> bool:
        """Does one piece of work; False: there was none."""
        raise NotImplementedError

    def may_work(self) -> bool:
        """Whether there may be something to do, so that a thread that sleeps has to look."""
        return True

    def idle_s(self) -> float | None:
        """How long there is nothing to do if nobody changes anything; None: for ever."""
        return None

    @contextmanager
    def _working(self, num_threads: int) -> Iterator[None]:
        """Torch's settings, which are each thread's own, as the request of a caller with so many CPU threads needs them."""
        self._set(num_threads)
        started_s = self._floor.clock()
        with no_grad():
            yield
        with self._floor.look():
            self._floor.note_piece(started_s)

    def _set(self, num_threads: int) -> None:
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if self._work.device.type == "cuda":
            torch.cuda.set_device(self._work.device)


class EncodeLine(Line):
    """Encodes the prompts of one request at a time."""

    @override
    def may_work(self) -> bool:
        return bool(self._floor.to_encode)

    @override
    def work(self) -> bool:
        """Encodes for one request."""
        floor = self._floor
        if not floor.to_encode:
            return False
        job, attempt = floor.to_encode.popleft()
        task: DenoisingTask | None = None
        failure: BaseException | None = None
        try:
            if job.attempt == attempt:
                with self._working(job.num_threads):
                    task = self._work.encode(job.plan)
        except BaseException as error:
            failure = error
        with floor.change():
            floor.is_encoding = False
            if job.attempt != attempt:
                return True
            if failure is not None:
                floor.book.fail(job, failure)
            else:
                job.task, job.encoded_s = task, floor.clock()
                floor.samples.add_ready(job)
        return True


class StepLine(Line):
    """The denoising loop.

    Args:
        floor: What the lines share.
        work: Of the model.
        steps: Takes the steps.
    """

    def __init__(self, floor: Floor, work: Work, steps: Steps) -> None:
        super().__init__(floor, work)
        self._steps = steps
        # The thread that is in an errand for which everything rests.
        self._alone: int | None = None
        # After an errand samples have their turn, however many others wait.
        self._owes_turn = False

    @property
    def is_alone(self) -> bool:
        """Whether the calling thread is in an errand for which everything rests."""
        return self._alone == threading.get_ident()

    @override
    def work(self) -> bool:
        """One turn: ends what is due; then an errand, or the samples that there is room for start and one step is taken."""
        floor = self._floor
        owed, self._owes_turn = self._owes_turn, False
        # The usual turn of a step takes the lock twice: it comes after a forward, which leaves nothing of this in the caches.
        with floor.change():
            floor.book.sweep()
            errand = None if owed else self._next_errand()
            starts = [] if errand or floor.pause == "freeze" else floor.samples.next_starts()
            batch = [] if errand or starts else self._next_batch()
            dropped = self._take_dropped()
        self._let_go(dropped)
        if errand is not None:
            self._owes_turn = True
            self._run(errand)
            return True
        if starts:
            for start in starts:
                self._start(start)
            with floor.look():
                batch = self._next_batch()
        if batch:
            self._step(batch)
        return bool(owed or dropped or starts or batch)

    @override
    def idle_s(self) -> float | None:
        """Until the next deadline."""
        with self._floor.look():
            deadline_s = self._floor.book.next_deadline_s()
        return None if deadline_s is None else max(deadline_s - self._floor.clock(), 0.0)

    def let_go(self) -> None:
        """Has other ranks leave the samples that have left, outside a turn."""
        with self._floor.look():
            dropped = self._take_dropped()
        self._let_go(dropped)

    def _take_dropped(self) -> list[RunningSample]:
        dropped, self._floor.dropped = self._floor.dropped, []
        return dropped

    def _let_go(self, dropped: list[RunningSample]) -> None:
        for running in dropped:
            with suppress(FlowrollError):  # of a lost rank, which has ended everything
                self._steps.stop(running)

    def _next_batch(self) -> list[RunningSample]:
        return [] if self._floor.pause == "freeze" else self._floor.samples.next_batch(self._steps.room)

    def _next_errand(self) -> Errand | None:
        floor = self._floor
        return floor.errands.next(floor.clock(), is_at_rest=floor.is_at_rest(), is_awaited=floor.is_awaited())

    def _run(self, errand: Errand) -> None:
        result: Any = None
        failure: BaseException | None = None
        is_wanted = errand.future.set_running_or_notify_cancel()
        self._alone = threading.get_ident() if errand.needs_rest else None
        try:
            if is_wanted:
                with self._working(errand.num_threads):
                    result = errand.action()
        except BaseException as error:
            failure = error
        self._alone = None
        with self._floor.change():
            is_awaited = self._floor.errands.done()
        if not (is_wanted and is_awaited):
            return
        if failure is None:
            errand.future.set_result(result)
        else:
            errand.future.set_exception(failure)

    def _start(self, start: Start) -> None:
        """Draws a sample's initial noise and gives it a place in the turns."""
        floor, job, task = self._floor, start.job, start.job.task
        running: RunningSample | None = None
        failure: BaseException | None = None
        try:
            if start.is_wanted and task is not None:
                with self._working(job.num_threads):
                    running = start.begin(task, floor.clock())
        except BaseException as error:
            failure = error
        with floor.change():
            if start.is_wanted and running is not None:
                job.started_s = running.started_s if job.started_s is None else job.started_s
                floor.samples.run(running)
                return
            floor.samples.release(job)
            if start.is_wanted and failure is not None:
                floor.book.fail(job, failure)

    def _step(self, batch: list[RunningSample]) -> None:
        floor = self._floor
        self._set(batch[0].job.num_threads)
        started_s = floor.clock()
        with no_grad():
            failures = self._steps.take_step(batch)
        with floor.change():
            floor.note_piece(started_s, running_pixels=floor.samples.running_pixels)
            floor.book.ledger.batches[len(batch)] += 1
            for running in batch:
                # Asked for each: the failure of one takes the others of its request out.
                if not running.is_wanted:
                    continue
                if running in failures:
                    floor.book.fail(running.job, failures[running])
                elif running.is_denoised:
                    floor.samples.rest(running)
                    floor.num_decoding += 1
                    running.job.note_denoised(floor.clock())
                    floor.to_decode.append(running)


class DecodeLine(Line):
    """Makes the answers of finished samples, one at a time."""

    @override
    def may_work(self) -> bool:
        return bool(self._floor.to_decode)

    @override
    def work(self) -> bool:
        """Decodes one sample."""
        floor = self._floor
        if not floor.to_decode:
            return False
        running = floor.to_decode.popleft()
        job, result = running.job, None
        failure: BaseException | None = None
        try:
            if running.is_wanted:
                with self._working(job.num_threads):
                    result = self._result(running)
        except BaseException as error:
            failure = error
        with floor.change():
            floor.num_decoding -= 1
            floor.samples.release(job)
            if not running.is_wanted:
                return True
            if failure is not None:
                floor.book.fail(job, failure)
                return True
            job.results[running.index] = result
            if len(job.results) == len(job.plan.seeds):
                floor.pace.note_request(job, floor.clock())
                floor.book.complete(job)
        return True

    def _result(self, running: RunningSample) -> Any:
        task, sample = running.task, running.sample
        image = self._work.decode(task, sample)
        seconds = self._floor.clock() - running.started_s
        finished = Finished(sample=sample, env=task.env, record=task.record, image=image, seconds=seconds)
        return running.job.finish(task.plan, finished)
