"""The messages that reach the loop, from callers and from the encode and decode stages."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from flowroll.engine.scheduler.loop import Loop

# The longest single wait, because a clock cannot represent every timeout; the loop simply waits again.
_LONGEST_WAIT_S = 3600.0

# What the loop shall do: call one of its methods. A message does not refer to the loop, which would keep an engine alive.
Message: TypeAlias = Callable[["Loop"], None]


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
