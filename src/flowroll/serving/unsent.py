"""Answers until they are sent: how much memory they may take together, and how slowly a client may read one.

An answer counts from the acceptance of its request, because whatever was accepted will be made and then has to be kept for as
long as its client takes to read it. It does not matter in which process its bytes lie meanwhile. Until the answer is there,
what the request itself holds, its latents and embeddings, counts as a part of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from flowroll.errors import QueueFullError

# Readers are done in seconds, or are let go after a minute.
_RETRY_S = (1.0, 5.0)


@dataclass(slots=True, kw_only=True)
class HeldAnswer:
    """The memory of one answer; see `AnswerMemory`.

    Attributes:
        expected_bytes: What the answer is expected to take, with what its request holds, until it is made.
        unsent_bytes: What it takes since it was made.
    """

    memory: AnswerMemory
    expected_bytes: int
    unsent_bytes: int = 0

    def made(self, num_bytes: int) -> None:
        """Notes that the answer is there, and how many bytes it takes."""
        self._move(expected=0, unsent=num_bytes)

    def release(self) -> None:
        """Notes that the answer was sent, or will never be. May be called twice."""
        self._move(expected=0, unsent=0)

    def _move(self, *, expected: int, unsent: int) -> None:
        self.memory.expected_bytes += expected - self.expected_bytes
        self.memory.unsent_bytes += unsent - self.unsent_bytes
        self.expected_bytes, self.unsent_bytes = expected, unsent


class AnswerMemory:
    """The memory of all answers of a server that are not sent to their end. It is used on the event loop alone.

    Args:
        max_bytes: Bytes of all of them together, beyond which no request is accepted.

    Attributes:
        expected_bytes: Bytes of the answers to requests that were accepted and are not answered yet.
        unsent_bytes: Bytes of the answers that were made and are not sent to their end.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.expected_bytes = self.unsent_bytes = 0

    def admit(self, num_bytes: int) -> HeldAnswer:
        """Makes room for the answer of a request. One is always admitted where there is no other.

        Args:
            num_bytes: What the answer is expected to take.

        Raises:
            QueueFullError: There is no room.
        """
        held = self.expected_bytes + self.unsent_bytes
        if held and held + num_bytes > self._max_bytes:
            raise QueueFullError(
                f"answers that are not sent yet must fit into {self._max_bytes} bytes, got {held} bytes of them and "
                f"{num_bytes} more; read the answers, or try again later.",
                retry_after_s=random.uniform(*_RETRY_S),
            )
        self.expected_bytes += num_bytes
        return HeldAnswer(memory=self, expected_bytes=num_bytes)


class SendPatience:
    """How long a client may still be waited for while it reads one answer.

    Only waiting counts, so that a server that is slow to make the bytes does not blame the client for it.

    Args:
        grace_s: Seconds that any answer may be waited for.
        min_bytes_per_s: Bytes that buy another second.
    """

    def __init__(self, grace_s: int | float, min_bytes_per_s: int) -> None:
        self._left_s, self._min_bytes_per_s = float(grace_s), min_bytes_per_s

    @property
    def left_s(self) -> float:
        """Seconds that are left; not above 0: the client is too slow."""
        return self._left_s

    def sent(self, num_bytes: int) -> None:
        """Notes bytes that the connection has taken."""
        self._left_s += num_bytes / self._min_bytes_per_s

    def waited(self, seconds: float) -> None:
        """Notes time for which the client took nothing."""
        self._left_s -= seconds
