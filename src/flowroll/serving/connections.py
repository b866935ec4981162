"""TCP connections: HTTP/1.1 as uvicorn speaks it, but no client may take as long, as many or as much as it likes.

uvicorn bounds how long a connection may idle between two requests, and how long headers may be. Bounded here: how many
connections there are, how long headers may take to come, how small the chunks of a body may be and how many of them are looked
at in one turn of the event loop, how long the rest of a body that nobody reads is waited for, and how long a client may take
nothing of its answer. How long a body takes that is read is bounded in `parsing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import uuid
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowroll.errors import FlowrollError, MalformedRequestError, QueueFullError
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import SlowRequestError, error_response
from flowroll.serving.metrics import Metrics
from flowroll.serving.middleware import REQUEST_ID_HEADER

_log = logging.getLogger(__name__)

# Request line and headers together; a piece more may pass.
MAX_HEADER_BYTES = 16 * 1024
_PIECE_BYTES = 1024
# A chunk takes some ten microseconds, and may be a byte. Of a body so many may be smaller than that on average.
_FREE_CHUNKS = 1024
_CHUNK_BYTES = 256
_EVENTS_A_TURN = 32
# After the grace period every answer is made; a client gets so long to read the rest of a large one.
_SEND_S = 2


class HttpConfig(uvicorn.Config):
    """How uvicorn serves an app of ours.

    Args:
        app: What `create_app` made.
        config: The same that it was made with.
    """

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        self.metrics: Metrics = app.state.metrics
        self.receive_timeout_s, self.max_connections = config.receive_timeout_s, config.max_connections
        super().__init__(
            app,
            # Said, because uvicorn takes another parser where one is installed.
            http=BoundedProtocol,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(config.receive_timeout_s),
            timeout_graceful_shutdown=_SEND_S,
        )


class _Parser(h11.Connection):
    """h11's own, which gives out so many events a turn, and refuses bodies in tiny chunks.

    Attributes:
        events_left: In this turn.
        refusal: Why the body was refused; None: it was not.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.events_left = _EVENTS_A_TURN
        self.refusal: str | None = None
        self._chunks = self._bytes = 0

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


class _Flow(FlowControl):
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


class BoundedProtocol(H11Protocol):
    """See the module. At most one deadline is set at a time: for headers, or for the rest of a body after its answer."""

    config: HttpConfig
    conn: _Parser
    flow: _Flow
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self.conn, self.flow = _Parser(), _Flow(transport)
        if len(self.connections) > (bound := self.config.max_connections):
            self._refuse(QueueFullError(f"the server must have at most {bound} connections, got one more; close others first."))
            return
        self._set_deadline(self._end_slow_headers)

    def data_received(self, data: bytes) -> None:
        """Takes bytes from the client."""
        # The parser's limit is one on headers that are not whole yet. In small pieces they are that for long enough.
        while data and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            super().data_received(data[:_PIECE_BYTES])
            data = data[_PIECE_BYTES:]
        if data and not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """Looks at what has come, a part of it in each turn of the event loop."""
        if self.transport.is_closing():
            return
        self.conn.events_left = _EVENTS_A_TURN
        super().handle_events()
        if not self.transport.is_closing():
            is_rest = not self.conn.events_left
            self.flow.hold(is_rest)
            if is_rest:
                self.loop.call_soon(self.handle_events)
        self._keep_deadline()

    def on_response_complete(self) -> None:
        """Notes that an answer has been given."""
        super().on_response_complete()
        self._keep_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notes the end of the connection."""
        self._clear_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, with a body like all others."""
        general = (
            f"the request must be HTTP/1.1 with at most {MAX_HEADER_BYTES} bytes of headers, got something else; use an HTTP "
            "library."
        )
        self._refuse(MalformedRequestError(self.conn.refusal or general))

    def _keep_deadline(self) -> None:
        ours, theirs = self.conn.our_state, self.conn.their_state
        if self.transport.is_closing():
            self._clear_deadline()
        elif theirs is h11.IDLE and ours is h11.IDLE:
            # Headers have begun. Otherwise uvicorn's own bound for idle connections runs.
            if self.conn.trailing_data[0]:
                self._set_deadline(self._end_slow_headers)
        elif theirs is h11.SEND_BODY and ours in (h11.DONE, h11.MUST_CLOSE):
            self._set_deadline(self._end_unread_body)
        else:
            self._clear_deadline()

    def _set_deadline(self, end: Callable[[], None]) -> None:
        """Sets a deadline, unless one is set: what trickles in must not move it."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.config.receive_timeout_s, end)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_slow_headers(self) -> None:
        if not self.conn.trailing_data[0]:
            # Nothing was asked, so there is nothing to answer.
            self.transport.abort()
            return
        self._refuse(
            SlowRequestError(
                f"the headers must come within {self.config.receive_timeout_s:g} s, got no end of them; send them at once."
            )
        )

    def _end_unread_body(self) -> None:
        self.transport.abort()

    def _refuse(self, error: FlowrollError) -> None:
        """Answers without the app, and ends the connection."""
        self._clear_deadline()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # An answer is under way; breaking it off is all that can be said.
            self.transport.abort()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
        response = error_response(error)
        response.headers["connection"] = "close"
        response.headers[REQUEST_ID_HEADER] = request_id = uuid.uuid4().hex
        self.config.metrics.observe_refusal(code=response.status_code, error=error.code)
        _log.info("refused", extra={"request_id": request_id, "status": response.status_code, "error": error.code})
        head = h11.Response(
            status_code=response.status_code, headers=response.raw_headers, reason=STATUS_PHRASES[response.status_code]
        )
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def open_listener(config: ServerConfig) -> socket.socket:
    """Returns a bound socket, which does not listen yet.

    Raises:
        SystemExit: The address is not to be had.
    """
    try:
        # IPPROTO_TCP is said for asyncio: it turns Nagle's delay off only then.
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A client that does not read would hold its answer, hundreds of MiB of it, for as long as it likes. The kernel
            # alone sees that nothing leaves; it breaks the connection off, as if the client had gone.
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(config.send_timeout_s * 1000)))
            listener.bind(address)
            stack.pop_all()
    except OSError as error:
        raise SystemExit(f"Error: {config.host}:{config.port} must be free to listen on, got {error}.") from None
    return listener
