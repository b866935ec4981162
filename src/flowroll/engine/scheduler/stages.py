"""The encode and decode stages, which work beside the loop on one thread each. They put their results into the inbox."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

from flowroll.engine.outputs import Finished
from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.sample import Sample
from flowroll.engine.scheduler.inbox import Inbox
from flowroll.engine.scheduler.request import Request, RunningSample, cancelled
from flowroll.openmp import release_team

T = TypeVar("T")
Work: TypeAlias = Callable[[], None]


def encoding(runner: Executor, inbox: Inbox, request: Request, clock: Callable[[], float]) -> Work:
    """Makes the work that encodes a request's prompts; it does nothing if the request was reset or cancelled before that."""
    attempt = request.attempt

    def encode() -> None:
        if request.attempt != attempt or request.future.cancelled():
            inbox.put(lambda loop: loop.take_encoded(request, attempt, cancelled()))
            return
        started_s = clock()
        outcome = _outcome(runner, request, lambda: runner.encode(request.plan))
        inbox.put(lambda loop: loop.take_encoded(request, attempt, outcome, started_s))

    return encode


def decoding(
    runner: Executor,
    inbox: Inbox,
    running: RunningSample,
    sample: Sample,
    clock: Callable[[], float],
    following: Sequence[tuple[RunningSample, Sample]] = (),
) -> Work:
    """Makes the work that decodes a sample and makes its answer; it does nothing if the sample is no longer wanted.

    Args:
        runner: Decodes the sample.
        inbox: Takes the answer.
        running: The sample as the scheduler knows it.
        sample: The sample.
        clock: Tells the time.
        following: Samples of the same batch key that are to be decoded after it.
    """
    of, request = running.of, running.of.request

    def answer() -> Any:
        finished = Finished(
            sample=sample,
            image=runner.decode(sample, [other for later, other in following if later.of.is_wanted]),
            seconds=clock() - running.started_s,
            first_step=running.first_step,
            last_step=running.last_step,
        )
        return request.finish(request.plan, finished)

    def decode() -> None:
        if not of.is_wanted:
            inbox.put(lambda loop: loop.take_decoded(of))
            return
        started_s = clock()
        outcome = _outcome(runner, request, answer)
        inbox.put(lambda loop: loop.take_decoded(of, outcome, started_s))

    return decode


def _outcome(runner: Executor, request: Request, make: Callable[[], T]) -> T | BaseException:
    """Returns what is made for a request, with the CPU threads of its caller, or the error."""
    try:
        runner.use_threads(request.num_threads)
        with torch.no_grad():
            return make()
    except BaseException as error:
        return error


class Stage:
    """Does work on its own thread, in the order in which it was submitted.

    Args:
        name: The name of the thread.
        on_death: Called on the thread if an error ends it, since whoever waits for its results would wait forever.
    """

    def __init__(self, name: str, on_death: Callable[[BaseException], None]) -> None:
        self._name, self._on_death = name, on_death
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Work) -> None:
        """Adds work without waiting for it."""
        self._queue.put(work)

    def start(self) -> None:
        """Starts the thread, unless it runs already."""
        if self._thread is None:
            self._thread = threading.Thread(target=_work_off, name=self._name, args=(self._queue, self._on_death), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Makes the thread end after its current work, without waiting for that. It may be called from a finalizer."""
        self._queue.put(None)

    def join(self, timeout_s: float | None) -> bool:
        """Waits for the end of the thread; returns whether it has ended within this time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()


def _work_off(waiting: queue.SimpleQueue[Work | None], on_death: Callable[[BaseException], None]) -> None:
    try:
        while (work := waiting.get()) is not None:
            work()
            # Deleted, because the work may hold the last reference to an engine.
            del work
            if waiting.empty():
                release_team()
    except BaseException as error:
        on_death(error)
