"""What happens around every HTTP request: its id, the bearer token, the log line, the counters, the last-resort error.

Plain ASGI, so that a streamed answer of hundreds of MiB passes through without a copy.
"""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from dataclasses import dataclass, field
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowroll.errors import EngineError, UnauthorizedError
from flowroll.serving.errors import error_response
from flowroll.serving.logs import log_request
from flowroll.serving.metrics import Metrics

REQUEST_ID_HEADER = "x-request-id"
# Milliseconds by stage, as in `queue;dur=0.1, encode;dur=8.2, ...`.
TIMING_HEADER = "x-flowroll-timing"
OPEN_PATHS = frozenset({"/liveness"})

_log = logging.getLogger(__name__)
_CLIENT_CLOSED = 499
_MAX_ID_CHARS = 256


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One HTTP request and its answer, while it lasts.

    Attributes:
        request_id: Made here; replaced by the caller's own once the body is read.
        suppress_logs: The caller wants no log line.
        status: Of the answer, once it began.
        body_bytes: Of the answer, so far.
        started_s: Monotonic clock.
        stages: Seconds that the answer took, by stage.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    suppress_logs: bool = False
    status: int | None = None
    body_bytes: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def shown_id(self) -> str:
        """The id as a header or a log line can carry it: percent-encoded, and cut where the caller's is very long."""
        return quote(self.request_id[:_MAX_ID_CHARS])[:_MAX_ID_CHARS]

    @property
    def shown_stages(self) -> str:
        """The stages as the header has them, in the way of Server-Timing."""
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in self.stages.items())


def exchange_of(request: Request) -> Exchange:
    """The exchange that a route's request belongs to."""
    exchange = request.state.exchange
    assert isinstance(exchange, Exchange)
    return exchange


class RequestMiddleware:
    """Wraps the app; see the module.

    Args:
        app: What it wraps.
        metrics: Counts every request.
        api_key: Demanded of every path but the open ones; None: of none.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._token = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange()
        scope.setdefault("state", {})["exchange"] = exchange

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = exchange.shown_id
                if exchange.stages:
                    headers[TIMING_HEADER] = exchange.shown_stages
            elif message["type"] == "http.response.body":
                exchange.body_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(exchange, scope, receive, observed_send)
        finally:
            self._observe(exchange, scope)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_authorized(scope):
            error = UnauthorizedError(
                "the request must carry the server's token, got none or another; send Authorization: Bearer."
            )
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            _log.info("request_id=%s: the client went away before its request was read", exchange.shown_id)
        except Exception:
            if exchange.status is not None:
                # The answer has begun: only breaking it off tells the client.
                raise
            _log.exception("request_id=%s failed in the server", exchange.shown_id)
            message = "the server must answer every request, got an internal error; see its log for the request id."
            await error_response(EngineError(message))(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return True
        sent = Headers(scope=scope).get("authorization", "")
        scheme, _, token = sent.partition(" ")
        # HTTP has the scheme's name in any case; the token is compared in constant time.
        return hmac.compare_digest(f"{scheme.capitalize()} {token.strip()}".encode(), self._token)

    def _observe(self, exchange: Exchange, scope: Scope) -> None:
        seconds = time.perf_counter() - exchange.started_s
        status = exchange.status or _CLIENT_CLOSED
        # Unknown paths share one label: their number is the caller's choice.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.observe_request(route=route, code=status, seconds=seconds, body_bytes=exchange.body_bytes)
        if not exchange.suppress_logs:
            log_request(
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=seconds,
                body_bytes=exchange.body_bytes,
                request_id=exchange.shown_id,
            )
