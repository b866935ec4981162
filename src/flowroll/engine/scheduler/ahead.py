"""Holds what was encoded for requests that still wait: until they are admitted, end, or have to be encoded again."""

from __future__ import annotations

from collections.abc import Sequence

from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.scheduler.policy import BatchLimits
from flowroll.engine.scheduler.request import Request

# The most bytes that are held; one request may exceed it.
_MOST_BYTES = 2**28


class EncodedAhead:
    """Holds the waiting requests whose prompts are encoded, or being encoded, before they are admitted.

    They wait like all others: they can expire and be cancelled, and nothing waits for them. Only rank 0 holds anything of them.

    Args:
        limits: The limits of what runs at the same time.
        most_bytes: The most bytes of conditioning that are held.
    """

    def __init__(self, limits: BatchLimits, most_bytes: int = _MOST_BYTES) -> None:
        self._limits, self._most_bytes = limits, most_bytes
        # None: the request is being encoded.
        self._held: dict[Request, Conditioning | None] = {}
        # What is being encoded counts as the largest so far; until one is known, requests are encoded one at a time.
        self._largest = 0

    def __contains__(self, request: Request) -> bool:
        return request in self._held

    @property
    def has_room(self) -> bool:
        """Whether one more request may be encoded ahead."""
        if sum(len(request.plan.samples) for request in self._held) >= self._limits.max_ready_samples:
            return False
        if not self._largest:
            return not self._held
        sizes = (self._largest if one is None else one.num_bytes for one in self._held.values())
        return sum(sizes) + self._largest <= self._most_bytes

    def begin(self, request: Request) -> None:
        """Notes that a request is being encoded."""
        self._held[request] = None

    def keep(self, request: Request, conditioning: Conditioning) -> bool:
        """Holds what was encoded if its request still waits; returns whether it does."""
        self._largest = max(self._largest, conditioning.num_bytes)
        if is_waiting := request in self._held:
            self._held[request] = conditioning
        return is_waiting

    def take(self, request: Request) -> Conditioning | None:
        """Removes a request, if it is here; returns what was encoded, or None if its encoding has not begun or not ended."""
        return self._held.pop(request, None)

    def clear(self) -> Sequence[Request]:
        """Removes all requests and returns them."""
        removed, self._held = tuple(self._held), {}
        return removed
