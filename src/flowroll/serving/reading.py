"""How much of what a connection has received is looked at in one turn of the event loop, and how small its chunks may be."""

from __future__ import annotations

from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl

# Request line and headers together; a piece more may pass.
MAX_HEADER_BYTES = 16 * 1024
# A chunk takes some ten microseconds, and may be a byte. Of a body so many may be smaller than that on average.
_FREE_CHUNKS = 1024
_CHUNK_BYTES = 256
_EVENTS_A_TURN = 32
# Of all connections together, as far as each gets two.
_EVENTS_TOGETHER = 256


class BoundedParser(h11.Connection):
    """h11's own, which gives out so many events a turn, and refuses bodies in tiny chunks.

    Attributes:
        events_left: How many events may still be taken in this turn.
        refusal: The reason why the body was refused; None if it was not.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.events_left = _EVENTS_A_TURN
        self.refusal: str | None = None
        self._chunks = self._bytes = 0

    def begin_turn(self, num_connections: int) -> None:
        """Begins another turn of the event loop, in which so many connections may have something to look at."""
        self.events_left = max(min(_EVENTS_A_TURN, _EVENTS_TOGETHER // max(num_connections, 1)), 2)

    def next_event(self) -> Any:
        """Returns the next event of this turn.

        Raises:
            RemoteProtocolError: What came is no HTTP, or comes in tiny chunks.
        """
        if not self.events_left:
            return h11.NEED_DATA
        self.events_left -= 1
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_end
            self._bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._bytes // _CHUNK_BYTES:
                self.refusal = (
                    f"the body must come in chunks of {_CHUNK_BYTES} bytes or more, {_FREE_CHUNKS} smaller ones aside, got "
                    f"{self._chunks} chunks in {self._bytes} bytes; send it in larger chunks, or with a Content-Length."
                )
                raise h11.RemoteProtocolError(self.refusal)
        return event


class HeldFlow(FlowControl):
    """uvicorn's own; reading also stops while what was read is still to be looked at."""

    _is_wanted, _is_held = True, False

    def pause_reading(self) -> None:
        """Stops reading until uvicorn wants more."""
        self._is_wanted = False
        super().pause_reading()

    def resume_reading(self) -> None:
        """Reads on, or will."""
        self._is_wanted = True
        if not self._is_held:
            super().resume_reading()

    def hold(self, is_held: bool) -> None:
        """Stops reading whatever uvicorn wants, or lets it decide again."""
        self._is_held = is_held
        if is_held:
            super().pause_reading()
        elif self._is_wanted:
            super().resume_reading()
