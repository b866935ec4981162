"""One TCP connection: HTTP/1.1 as uvicorn speaks it, but no client may take as long as it likes.

uvicorn bounds how long a connection may idle between two requests, and how long headers may be. Bounded here: how long headers
may take to come, and how long the rest of a body that nobody reads is waited for. A body that is read is bounded in `parsing`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from flowroll.errors import MalformedRequestError
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import SlowRequestError, error_response
from flowroll.serving.metrics import Metrics
from flowroll.serving.middleware import REQUEST_ID_HEADER

_log = logging.getLogger(__name__)

# Request line and headers together; a piece more may pass.
MAX_HEADER_BYTES = 16 * 1024
_PIECE_BYTES = 1024
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
        self.receive_timeout_s = config.receive_timeout_s
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


class BoundedProtocol(H11Protocol):
    """See the module. At most one deadline is set at a time: for headers, or for the rest of a body after its answer."""

    config: HttpConfig
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._set_deadline(self._end_slow_headers)

    def data_received(self, data: bytes) -> None:
        """Takes bytes from the client."""
        # The parser's limit is one on headers that are not whole yet. In small pieces they are that for long enough.
        while data and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            super().data_received(data[:_PIECE_BYTES])
            data = data[_PIECE_BYTES:]
        if data and not self.transport.is_closing():
            super().data_received(data)
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
        self._refuse(
            MalformedRequestError(
                f"the request must be HTTP/1.1 with at most {MAX_HEADER_BYTES} bytes of headers, got something else; use an "
                "HTTP library."
            )
        )

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

    def _refuse(self, error: MalformedRequestError) -> None:
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
