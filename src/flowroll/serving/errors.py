"""Every error body the server sends: `{"error": {"code", "message", "field"}}`."""

from __future__ import annotations

import math

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from flowroll.errors import FlowrollError, MalformedRequestError, NotFoundError, QueueFullError, UnauthorizedError
from flowroll.wire.control import ErrorBody


class SlowRequestError(MalformedRequestError):
    """The request does not come to an end in time; a `MalformedRequestError` to the client."""

    status = 408


# What every route can answer; shown in the OpenAPI document.
COMMON_RESPONSES: dict[int | str, dict[str, object]] = {
    401: {"model": ErrorBody, "description": "No valid bearer token"},
    403: {"model": ErrorBody, "description": "The host is not the server's, or a browser sends it for another site's page"},
}
WORK_RESPONSES: dict[int | str, dict[str, object]] = {
    **COMMON_RESPONSES,
    400: {"model": ErrorBody, "description": "The body is not JSON"},
    406: {"model": ErrorBody, "description": "None of the accepted media types is offered"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    415: {"model": ErrorBody, "description": "The body is not sent as application/json"},
    408: {"model": ErrorBody, "description": "The request's own deadline passed, or its body came too slowly"},
    409: {"model": ErrorBody, "description": "Generation is paused, the engine sleeps, or the weights are older than demanded"},
    422: {"model": ErrorBody, "description": "A value breaks a rule, or a field is unknown"},
    429: {"model": ErrorBody, "description": "The queue is full; see Retry-After"},
    499: {"model": ErrorBody, "description": "The request was aborted"},
    500: {"model": ErrorBody, "description": "The engine failed while it ran this request"},
    503: {"model": ErrorBody, "description": "The server is shutting down"},
}
WEIGHTS_RESPONSES: dict[int | str, dict[str, object]] = {
    **{status: response for status, response in WORK_RESPONSES.items() if status not in (406, 429, 499)},
    408: {"model": ErrorBody, "description": "The body came too slowly"},
    409: {"model": ErrorBody, "description": "The weights are not those that are expected"},
    422: {"model": ErrorBody, "description": "A value breaks a rule, or the new weights are not the module's; nothing changed"},
}
CONTROL_RESPONSES: dict[int | str, dict[str, object]] = {
    status: response for status, response in WEIGHTS_RESPONSES.items() if status in (400, 401, 403, 408, 413, 415, 503)
}
CONTROL_RESPONSES[422] = WORK_RESPONSES[422]
DISK_RESPONSES: dict[int | str, dict[str, object]] = {
    **WEIGHTS_RESPONSES,
    403: {"model": ErrorBody, "description": "The path is outside every folder of --weights-root, or as elsewhere"},
}


def error_response(error: FlowrollError, *, status: int | None = None) -> JSONResponse:
    """Returns the answer that tells the client of an error.

    Args:
        error: The error, which the client raises again.
        status: HTTP status, if not the one of the error's class.
    """
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    content = {"error": {"code": error.code, "message": error.message, "field": error.field}}
    return JSONResponse(content, status_code=status or error.status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes the app answer with our body whatever a route, or the routing itself, raises."""

    async def on_flowroll_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, FlowrollError)
        request.state.context.error = error.code
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        shown = _routing_error(request, error)
        request.state.context.error = shown.code
        response = error_response(shown, status=error.status_code)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(FlowrollError, on_flowroll_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _routing_error(request: Request, error: HTTPException) -> FlowrollError:
    path = request.url.path[:200]
    if error.status_code == 404:
        return NotFoundError(f"the path must be a route of this server, got {path}; see /openapi.json.")
    if error.status_code == 405:
        allowed = Headers(dict(error.headers or {})).get("allow", "another method")
        return NotFoundError(f"{path} must be called with {allowed}, got {request.method}; see /openapi.json.")
    return MalformedRequestError(f"the request must be valid HTTP, got {error.detail}; see /openapi.json.")
