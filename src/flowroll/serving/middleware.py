"""What happens around every HTTP request: id, who may send it, log line, counters, spans, last-resort error.

This is plain ASGI, so that a streamed answer of hundreds of MiB passes through without a copy.
"""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowroll.engine.scheduler import StageSpan
from flowroll.errors import EngineError, FlowrollError, UnauthorizedError
from flowroll.logs import POLLED, log_request, name_request
from flowroll.serving.errors import error_response
from flowroll.serving.metrics import Metrics
from flowroll.serving.origins import OriginGuard
from flowroll.serving.tracing import Tracing
from flowroll.serving.unsent import HeldAnswer
from flowroll.types import Exactness

REQUEST_ID_HEADER = "x-request-id"
# It holds milliseconds by stage, as in `queue;dur=0.1, encode;dur=8.2, ...`.
TIMING_HEADER = "x-flowroll-timing"
# Of a server in the fast mode, in every answer; an exact one says nothing.
EXACTNESS_HEADER = "x-flowroll-exactness"
# The page at /docs and its scripts are the same for every server; the document that they show is guarded.
OPEN_PATHS = frozenset({"/liveness", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"})

_log = logging.getLogger(__name__)
_CLIENT_CLOSED = 499
_MAX_ID_CHARS = 256


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """One HTTP request and its answer, while it lasts.

    Attributes:
        request_id: Id of the request; made here, and replaced by the caller's own once the body is read.
        suppress_logs: Whether the caller wants no log line.
        status: HTTP status of the answer; None until it begins.
        error: Code of the error that the answer is; None: it is no error.
        body_bytes: Bytes of the answer's body so far.
        request_bytes: Bytes of the request's body that are kept until it is answered.
        started_s: When the request began, by the monotonic clock.
        answered_s: When the answer began.
        spans: The stages of the request's time, as far as they are known.
        held: The memory of its answer; None: an answer that is not worth counting.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    suppress_logs: bool = False
    status: int | None = None
    error: str | None = None
    body_bytes: int = 0
    request_bytes: int = 0
    started_s: float = field(default_factory=time.monotonic)
    answered_s: float | None = None
    spans: list[StageSpan] = field(default_factory=list)
    held: HeldAnswer | None = None

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds by stage, in the order in which the stages were reached."""
        totals: dict[str, float] = {}
        for span in self.spans:
            totals[span.stage] = totals.get(span.stage, 0.0) + span.seconds * 1000
        return totals

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Notes the time of what happens inside as that stage."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(StageSpan(stage=name, start_s=start_s, end_s=time.monotonic()))


def context_of(request: Request) -> RequestContext:
    """Returns the context of a route's request."""
    context = request.state.context
    assert isinstance(context, RequestContext)
    return context


class RequestMiddleware:
    """Wraps the app with what the module says.

    Args:
        app: The app that answers.
        metrics: Counts every request.
        api_key: The token that every path but the open ones demands; None: no path does.
        origins: Refuses what a browser must not send.
        tracing: Makes spans of requests; None: there are no spans.
        exactness: Whether the engine is exact; every answer names one that is not.
        keyed_elsewhere: A path whose routes, with all below it, look for the key themselves; None: there is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        api_key: str | None,
        origins: OriginGuard,
        tracing: Tracing | None,
        exactness: Exactness = "exact",
        keyed_elsewhere: str | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._origins = origins
        self._tracing = tracing
        self._exactness = exactness
        self._keyed_elsewhere = keyed_elsewhere
        self._token = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext()
        scope.setdefault("state", {})["context"] = context
        name_request(lambda: context.request_id)

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status, context.answered_s = message["status"], time.monotonic()
                headers = MutableHeaders(scope=message)
                # Percent-encoded as a header needs it, and cut where the caller's id is very long.
                headers[REQUEST_ID_HEADER] = quote(context.request_id[:_MAX_ID_CHARS])[:_MAX_ID_CHARS]
                if self._exactness != "exact":
                    headers[EXACTNESS_HEADER] = self._exactness
                if stages := context.stages:
                    headers[TIMING_HEADER] = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in stages.items())
            elif message["type"] == "http.response.body":
                context.body_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(context, scope, receive, observed_send)
        finally:
            if context.held is not None:
                context.held.release()
            self._observe(context, scope)

    async def _answer(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_sender(scope)
        except FlowrollError as error:
            context.error = error.code
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            _log.info("the client went away before its request was read or its answer sent")
        except Exception:
            if context.status is not None:
                # The answer has begun: only breaking it off tells the client.
                raise
            _log.exception("the request failed in the server")
            message = "the server must answer every request, got an internal error; see its log for the request id."
            context.error = EngineError.code
            await error_response(EngineError(message))(scope, receive, send)

    def _check_sender(self, scope: Scope) -> None:
        """Refuses whoever may not send this request.

        Raises:
            ForbiddenError: A browser sends it for a page of another site, or by a name that is not the server's.
            UnauthorizedError: It carries no valid token.
        """
        headers = Headers(scope=scope)
        self._origins.check(scope["method"], scope["path"], headers)
        above, path = self._keyed_elsewhere, scope["path"]
        if self._token is None or path in OPEN_PATHS or (above is not None and f"{path}/".startswith(f"{above}/")):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # HTTP has the scheme's name in any case; the token is compared in constant time.
        if not hmac.compare_digest(f"{scheme.capitalize()} {token.strip()}".encode(), self._token):
            raise UnauthorizedError(
                "the request must carry the server's token, got none or another; send Authorization: Bearer."
            )

    def _observe(self, context: RequestContext, scope: Scope) -> None:
        """Counts, traces and logs a request that has ended."""
        now_s = time.monotonic()
        if context.spans and context.answered_s is not None:
            context.spans.append(StageSpan(stage="send", start_s=context.answered_s, end_s=now_s))
        seconds, status, error = now_s - context.started_s, context.status or _CLIENT_CLOSED, context.error
        # Unknown paths share one label, because their number is the caller's choice.
        route, method = getattr(scope.get("route"), "path", "other"), scope["method"]
        self._metrics.observe_request(route=route, code=status, seconds=seconds, body_bytes=context.body_bytes, error=error)
        self._metrics.observe_stages(context.spans)
        trace_id = None
        if self._tracing is not None and route not in POLLED:
            attributes = {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "http.response.body.size": context.body_bytes,
                "flowroll.request_id": context.request_id,
            }
            trace_id = self._tracing.record(
                f"{method} {route}",
                headers=Headers(scope=scope),
                start_s=context.started_s,
                spans=context.spans,
                attributes=attributes | ({} if error is None else {"error.type": error}),
            )
        if not context.suppress_logs:
            values = {
                "request_id": context.request_id,
                "method": method,
                "duration_ms": round(seconds * 1000, 1),
                "bytes": context.body_bytes,
                "error": error,
                "trace_id": trace_id,
                **{f"{stage}_ms": round(ms, 1) for stage, ms in context.stages.items()},
            }
            known = {name: value for name, value in values.items() if value is not None}
            log_request(path=scope["path"], status=status, values=known)
