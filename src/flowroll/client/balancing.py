"""Which of several servers a request goes to, and when it is sent to another one. This module does no input or output."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator

from flowroll.errors import (
    AsleepError,
    FlowrollError,
    OutdatedWeightsError,
    PausedError,
    QueueFullError,
    RankLostError,
    ServerConnectionError,
    ShuttingDownError,
)

# What a server answers when it does not run a request now; another one may.
_ELSEWHERE = (QueueFullError, ShuttingDownError, RankLostError, PausedError, AsleepError, OutdatedWeightsError)
# A server that cannot be reached is asked last for so long, and twice as long after each further failure.
_FIRST_REST_S, _MAX_REST_S = 1.0, 30.0


class Attempt:
    """One server's turn at a request.

    Attributes:
        index: The place of the server among those that were given.
        error: Why another server must be asked; None: it need not.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.error: FlowrollError | None = None

    def failed(self, error: FlowrollError) -> None:
        """Notes an error after which another server may be asked; any other is raised."""
        if not may_go_elsewhere(error):
            raise error
        self.error = error


class Balancer:
    """Gives each request to the server with the least work in flight, counted in image-steps. Threads may share it.

    Args:
        num_servers: The number of servers.
    """

    def __init__(self, num_servers: int) -> None:
        self._lock = threading.Lock()
        self._in_flight = [0] * num_servers
        self._failures = [0] * num_servers
        self._rests_until_s = [0.0] * num_servers
        self._last_turn = [0] * num_servers
        self._turn = 0

    def attempts(self, image_steps: int) -> Iterator[Attempt]:
        """Yields one server after the other, until an attempt has no error.

        Args:
            image_steps: The number of denoising steps of all samples of the request together.

        Raises:
            FlowrollError: Every server was asked and none runs the request: the error with the soonest Retry-After, if one has
                it, otherwise the first one.
        """
        errors: list[FlowrollError] = []
        tried: set[int] = set()
        while len(tried) < len(self._in_flight):
            attempt = Attempt(self._take(image_steps, tried))
            tried.add(attempt.index)
            try:
                yield attempt
            finally:
                self._release(attempt, image_steps)
            if attempt.error is None:
                return
            errors.append(attempt.error)
        raise _most_hopeful(errors)

    def _take(self, image_steps: int, tried: Collection[int]) -> int:
        now_s = time.monotonic()
        with self._lock:
            index = min(
                (index for index in range(len(self._in_flight)) if index not in tried),
                key=lambda index: (self._rests_until_s[index] > now_s, self._in_flight[index], self._last_turn[index]),
            )
            self._in_flight[index] += image_steps
            self._turn += 1
            self._last_turn[index] = self._turn
        return index

    def _release(self, attempt: Attempt, image_steps: int) -> None:
        index = attempt.index
        with self._lock:
            self._in_flight[index] -= image_steps
            if isinstance(attempt.error, ServerConnectionError):
                rest_s = min(_FIRST_REST_S * 2 ** min(self._failures[index], 10), _MAX_REST_S)
                self._failures[index] += 1
                self._rests_until_s[index] = time.monotonic() + rest_s
            else:
                self._failures[index], self._rests_until_s[index] = 0, 0.0


def may_go_elsewhere(error: FlowrollError) -> bool:
    """Tells whether another server may be asked: this one refused for a reason of its own, or no byte of its answer came."""
    return isinstance(error, _ELSEWHERE) or (isinstance(error, ServerConnectionError) and error.is_unanswered)


def _most_hopeful(errors: Collection[FlowrollError]) -> FlowrollError:
    full = [error for error in errors if isinstance(error, QueueFullError)]
    return min(full, key=lambda error: error.retry_after_s) if full else next(iter(errors))
