"""The messages that reach the loop, from callers and from the encode and decode stages."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.scheduler.request import Request, RequestSample
from flowroll.engine.scheduler.tasks import ControlTask, ExclusiveMode
from flowroll.errors import FlowrollError

# The longest single wait, because a clock cannot represent every timeout; the loop simply waits again.
_LONGEST_WAIT_S = 3600.0

PauseMode: TypeAlias = Literal["finish", "freeze"]


@dataclass(frozen=True, slots=True)
class Submit:
    """Accept a new request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a request or a task, because its caller no longer wants it."""

    future: Future[Any]


@dataclass(frozen=True, slots=True)
class Abort:
    """End all requests with this id, or all requests if it is None; the answer is their number.

    `keep_partial` says whether requests of which samples are finished end in these.
    """

    request_id: str | None
    answer: Future[int]
    keep_partial: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Admit no more requests; those that run either finish or freeze before their next step. The mode None ends the pause."""

    mode: PauseMode | None
    answer: Future[None]


@dataclass(frozen=True, slots=True)
class StageDied:
    """Go on no more, because the thread of a stage has died of this error."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Hold:
    """Admit no requests while `is_holding` is set. Running requests go on."""

    is_holding: bool


@dataclass(frozen=True, slots=True)
class Do:
    """Run a control task on the loop's thread.

    `mode` says what happens to running requests if the task needs that none runs.
    """

    task: ControlTask
    mode: ExclusiveMode


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encode stage has finished a request, with a conditioning or an error.

    `started_s` is when it began; None means that it skipped the request.
    """

    request: Request
    attempt: int
    started_s: float | None = None
    conditioning: Conditioning | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """The decode stage has finished a sample, with an answer or an error.

    `started_s` is when it began; None means that it skipped the sample.
    """

    sample: RequestSample
    started_s: float | None = None
    answer: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """End all requests and tasks in this error, and all that arrive later."""

    error: FlowrollError


@dataclass(frozen=True, slots=True)
class Halt:
    """End the loop's thread after this turn."""


Message: TypeAlias = Submit | Cancel | Abort | Pause | StageDied | Hold | Do | Encoded | Decoded | Stop | Halt


class Inbox:
    """The messages in the order in which they arrived. Any thread may put messages; only the loop's thread takes them."""

    def __init__(self) -> None:
        # A SimpleQueue, because its `put` may also be called from a finalizer, during garbage collection.
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._peeked: deque[Message] = deque()

    def put(self, message: Message) -> None:
        """Adds a message."""
        self._queue.put(message)

    def take_all(self) -> Iterator[Message]:
        """Yields the messages that have arrived, without waiting for more."""
        while self._peeked:
            yield self._peeked.popleft()
        while True:
            try:
                yield self._queue.get_nowait()
            except queue.Empty:
                return

    def wait(self, timeout_s: float | None) -> bool:
        """Waits until there is a message, at most for this time; None: without a limit. It may return early.

        Returns:
            Whether there is one.
        """
        if self._peeked:
            return True
        try:
            self._peeked.append(self._queue.get(timeout=None if timeout_s is None else min(timeout_s, _LONGEST_WAIT_S)))
        except queue.Empty:
            return False
        return True
