"""TCP connections: HTTP/1.1 as uvicorn speaks it, but no client may take as long, as many or as much as it likes.

uvicorn bounds how long a connection may idle between two requests, and how long headers may be. Bounded here: how many
connections there are, how long headers may take to come, and how slowly an answer may be read. A connection whose request is
answered before its body has come ends with that answer; the rest is dropped unseen. `reading` bounds what is looked at in one
turn of the event loop, and `parsing` how long a body takes that is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import random
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowroll.errors import FlowrollError, MalformedRequestError, QueueFullError
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import SlowRequestError, error_response
from flowroll.serving.metrics import Metrics
from flowroll.serving.middleware import REQUEST_ID_HEADER
from flowroll.serving.reading import MAX_HEADER_BYTES, BoundedParser, HeldFlow
from flowroll.serving.unsent import SendPatience

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1024
# As many connections are accepted in one turn of the event loop, each with a descriptor, before the first one is refused.
_BACKLOG = 256
# A client that was refused without the app gets so long to read why.
_REFUSED_S = 1.0
_RETRY_S = (1.0, 3.0)
# Records of one kind that an attack can cause at will are so far apart.
_QUIET_S = 10.0
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
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
        self.send_timeout_s, self.min_send_bytes_per_s = config.send_timeout_s, config.min_send_bytes_per_s
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
            backlog=_BACKLOG,
            timeout_keep_alive=math.ceil(config.receive_timeout_s),
            timeout_graceful_shutdown=_SEND_S,
        )


class _LastAnswer:
    """What a request is given for its connection's transport if its answer is the last one there.

    A socket that is closed while bytes are unread resets the connection, and the client may lose the answer. So the end of the
    answer is the end of sending alone, and what still comes is dropped.

    Args:
        protocol: The protocol of the connection.
    """

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        """Sends a part of the answer."""
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        """Returns whether nothing more can be sent."""
        return self._protocol.transport.is_closing()

    def close(self) -> None:
        """Ends the answer, and the connection once the client has gone or its time is up."""
        self._protocol.drop_the_rest()


class BoundedProtocol(H11Protocol):
    """See the module. At most one deadline is set at a time: for headers, or for the rest of a body after its answer."""

    config: HttpConfig
    conn: BoundedParser
    flow: HeldFlow
    _deadline: asyncio.TimerHandle | None = None
    _is_dropping = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self.conn, self.flow = BoundedParser(), HeldFlow(transport)
        self._app, self.app = self.app, self._answer
        if len(self.connections) > (bound := self.config.max_connections):
            message = f"the server must have at most {bound} connections, got one more; close others first."
            self._refuse(QueueFullError(message, retry_after_s=random.uniform(*_RETRY_S)))
            # At once: one beyond the bound may not stay to read it.
            self.transport.close()
            return
        self._set_deadline(self._end_slow_headers, self.config.receive_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Takes bytes from the client."""
        if self._is_dropping:
            return
        # The parser's limit is one on headers that are not whole yet. In small pieces they are that for long enough.
        while data and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            super().data_received(data[:_PIECE_BYTES])
            data = data[_PIECE_BYTES:]
        if data and not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        """Looks at what has come, a part of it in each turn of the event loop."""
        if self.transport.is_closing() or self._is_dropping:
            return
        self.conn.begin_turn(len(self.connections))
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

    def drop_the_rest(self, seconds: float | None = None) -> None:
        """Ends the sending, and drops unseen what still comes until the client has gone.

        Args:
            seconds: How long that may take; None: as long as the headers of a request.
        """
        self._is_dropping = True
        self._clear_deadline()
        self._set_deadline(self.transport.abort, self.config.receive_timeout_s if seconds is None else seconds)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.hold(False)
        self.flow.resume_reading()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the app answer a request, within bounds on how slowly its client reads."""
        cycle = self.cycle
        patience = SendPatience(self.config.send_timeout_s, self.config.min_send_bytes_per_s)

        async def bounded_send(message: Message) -> None:
            if message["type"] == "http.response.start" and self.conn.their_state is h11.SEND_BODY:
                # Whoever is answered before its body has come could go on sending it for ever.
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
                cycle.transport = _LastAnswer(self)  # type: ignore[assignment]
            if self.flow.write_paused and not cycle.disconnected:
                await self._wait_for_reader(patience)
            await send(message)
            patience.sent(len(message.get("body", b"")))
            if self.flow.write_paused and not message.get("more_body", False):
                # It is there for as long as it is not sent.
                await self._wait_for_reader(patience)

        await self._app(scope, receive, bounded_send)

    async def _wait_for_reader(self, patience: SendPatience) -> None:
        """Waits until the client has taken what was sent; one that is too slow loses its connection."""
        began_s = self.loop.time()
        try:
            async with asyncio.timeout(max(patience.left_s, 0.0)):
                await self.flow.drain()
        except TimeoutError:
            _log.info("a client reads its answer too slowly and is let go")
            self.transport.abort()
        patience.waited(self.loop.time() - began_s)

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
                self._set_deadline(self._end_slow_headers, self.config.receive_timeout_s)
        elif not self._is_dropping:
            self._clear_deadline()

    def _set_deadline(self, end: Callable[[], None], seconds: float) -> None:
        """Sets a deadline, unless one is set: what trickles in must not move it."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(seconds, end)

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

    def _refuse(self, error: FlowrollError) -> None:
        """Answers without the app, and ends the connection."""
        self._clear_deadline()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # An answer is under way; breaking it off is all that can be said.
            self.transport.abort()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
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
        self.drop_the_rest(_REFUSED_S)


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


def quieten_accept_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Logs one line, now and then, of connections that find no descriptor; asyncio would log a traceback for each attempt."""
    last_s, num_quiet = -math.inf, 0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last_s, num_quiet
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _OUT_OF_DESCRIPTORS and "socket" in context):
            loop.default_exception_handler(context)
            return
        num_quiet += 1
        if (now_s := time.monotonic()) - last_s >= _QUIET_S:
            _log.error("connections cannot be accepted: %s (%d attempts); allow more open files", error.strerror, num_quiet)
            last_s, num_quiet = now_s, 0

    loop.set_exception_handler(handle)
