"""What reaches the loop: messages from callers and from the encode and decode stages."""

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

# A wait can be no longer than clocks can tell; whoever waits looks again.
_LONGEST_WAIT_S = 3600.0

PauseMode: TypeAlias = Literal["finish", "freeze"]


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller of a request, or of a task, is not interested any more."""

    future: Future[Any]


@dataclass(frozen=True, slots=True)
class Abort:
    """All requests of an id are to end, or all there are; the answer is how many there were."""

    request_id: str | None
    answer: Future[int]


@dataclass(frozen=True, slots=True)
class Pause:
    """No request is admitted from now on; those that run finish, or freeze at their next step. None ends the pause."""

    mode: PauseMode | None
    answer: Future[None]


@dataclass(frozen=True, slots=True)
class Hold:
    """No request is admitted while this is so; what runs goes on."""

    is_holding: bool


@dataclass(frozen=True, slots=True)
class Do:
    """A task for the loop's thread; `mode` is what becomes of running requests if it needs idleness."""

    task: ControlTask
    mode: ExclusiveMode


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encode stage is done with a request: its conditioning, or an error, and when it began; None: it did nothing."""

    request: Request
    attempt: int
    started_s: float | None = None
    conditioning: Conditioning | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """The decode stage is done with a sample: its answer, or an error, and when it began; None: it did nothing."""

    sample: RequestSample
    started_s: float | None = None
    answer: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Everything ends in this error, and so does what comes later."""

    error: FlowrollError


@dataclass(frozen=True, slots=True)
class Halt:
    """The loop's thread ends after this turn."""


Message: TypeAlias = Submit | Cancel | Abort | Pause | Hold | Do | Encoded | Decoded | Stop | Halt


class Inbox:
    """Messages in the order in which they came. Any thread may put, the loop's alone takes."""

    def __init__(self) -> None:
        # Its `put` may be called from anywhere, also while an object is collected.
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._peeked: deque[Message] = deque()

    def put(self, message: Message) -> None:
        """Adds a message."""
        self._queue.put(message)

    def take_all(self) -> Iterator[Message]:
        """Yields what is there, without waiting."""
        while self._peeked:
            yield self._peeked.popleft()
        while True:
            try:
                yield self._queue.get_nowait()
            except queue.Empty:
                return

    def wait(self, timeout_s: float | None) -> None:
        """Waits until there is a message, or for so long; None: for ever."""
        if self._peeked:
            return
        try:
            self._peeked.append(self._queue.get(timeout=None if timeout_s is None else min(timeout_s, _LONGEST_WAIT_S)))
        except queue.Empty:
            return
