"""The encode and decode stages: work beside the loop, on a thread each. What they made goes to the inbox."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from flowroll.engine.outputs import Finished
from flowroll.engine.runner.sample import Sample
from flowroll.engine.scheduler.inbox import Decoded, Encoded, Inbox
from flowroll.engine.scheduler.request import Request, RunningSample
from flowroll.engine.scheduler.runner import Runner

Work: TypeAlias = Callable[[], None]


@runtime_checkable
class Stage(Protocol):
    """Does work in the order in which it came."""

    def submit(self, work: Work) -> None:
        """Adds work; does not wait for it."""

    def start(self) -> None:
        """Begins to work, unless it does so already."""

    def stop(self) -> None:
        """Ends after the work that it is at; does not wait."""

    def join(self, timeout_s: float | None) -> bool:
        """Waits for the end; False: it did not come within so long."""

    @property
    def is_alive(self) -> bool:
        """Whether it works, or waits for work."""


def encoding(runner: Runner, inbox: Inbox, request: Request, clock: Callable[[], float]) -> Work:
    """Makes the work of encoding a request's prompts, unless the request is back at its start by then."""
    attempt = request.attempt

    def encode() -> None:
        if request.attempt != attempt:
            inbox.put(Encoded(request, attempt))
            return
        started_s = clock()
        try:
            runner.use_threads(request.num_threads)
            with torch.no_grad():
                done = Encoded(request, attempt, started_s, runner.encode(request.plan))
        except BaseException as error:
            done = Encoded(request, attempt, started_s, error=error)
        inbox.put(done)

    return encode


def decoding(runner: Runner, inbox: Inbox, running: RunningSample, sample: Sample, clock: Callable[[], float]) -> Work:
    """Makes the work of a sample's picture and answer, unless nobody wants the sample by then."""
    of, request = running.of, running.of.request

    def decode() -> None:
        if not of.is_wanted:
            inbox.put(Decoded(of))
            return
        started_s = clock()
        try:
            runner.use_threads(request.num_threads)
            with torch.no_grad():
                image = runner.decode(sample)
                finished = Finished(sample=sample, image=image, seconds=clock() - running.started_s)
                done = Decoded(of, started_s, request.finish(request.plan, finished))
        except BaseException as error:
            done = Decoded(of, started_s, error=error)
        inbox.put(done)

    return decode


class ThreadStage:
    """A stage on a thread of its own.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Work) -> None:
        """Adds work; does not wait for it."""
        self._queue.put(work)

    def start(self) -> None:
        """Starts the thread, unless it runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=_work_off, name=self._name, args=(self._queue,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the work that it is at; does not wait. Safe while an object is collected."""
        self._queue.put(None)

    def join(self, timeout_s: float | None) -> bool:
        """Waits for the thread's end; False: it did not come within so long."""
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


def _work_off(waiting: queue.SimpleQueue[Work | None]) -> None:
    while (work := waiting.get()) is not None:
        work()
        # What it refers to may be the last hold on an engine.
        del work
