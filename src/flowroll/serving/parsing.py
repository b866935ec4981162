"""From an HTTP request to a plan: everything that can be refused before the engine is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from flowroll.engine.plan import RequestPlan, plan_request
from flowroll.engine.scoring import ScorePlan, plan_score
from flowroll.engine.service import EngineFacts
from flowroll.errors import InvalidRequestError, MalformedRequestError, PayloadTooLargeError
from flowroll.serving.errors import SlowRequestError
from flowroll.serving.forms import FORM, parse_form_body
from flowroll.serving.middleware import RequestContext, context_of
from flowroll.serving.state import AppState
from flowroll.types import SamplingParams, ScoreParams
from flowroll.wire.codec import JSON, MSGPACK
from flowroll.wire.fields import Request as Message
from flowroll.wire.schema import GenerateRequest, ImageEditsRequest, ImagesRequest, RolloutRequest, parse, parse_json_body
from flowroll.wire.scoring import decode_score_request
from flowroll.wire.validation import parse_msgpack_body

SamplingT = TypeVar("SamplingT", RolloutRequest, GenerateRequest, ImagesRequest, ImageEditsRequest)
RequestT = TypeVar("RequestT", bound=Message)
ParamsT = TypeVar("ParamsT", SamplingParams, ScoreParams)

# Of a request that steers the server: a path and some names. It is parsed on the event loop, in well under a millisecond.
MAX_CONTROL_BYTES = 64 * 1024

# What a route reads, where it is not both JSON and msgpack.
_MEDIA_TYPES: Mapping[type, Sequence[str]] = {ImagesRequest: (JSON,), ImageEditsRequest: (FORM,)}
# A body that comes more slowly than this in the long run is not waited for.
_MIN_BODY_BYTES_PER_S = 64 * 1024
# A number of so many digits is above every limit, whatever follows.
_MAX_LENGTH_DIGITS = 20


class UnsupportedMediaTypeError(MalformedRequestError):
    """The body is of a type that no route reads; a `MalformedRequestError` to the client."""

    status = 415


async def accept_request(request: Request, state: AppState, model: type[SamplingT]) -> tuple[SamplingT, RequestPlan]:
    """Reads, parses and plans a request.

    Args:
        request: Its body is read here.
        state: The state of the app.
        model: What the body must be.

    Returns:
        The request as it was sent, and the plan to submit.

    Raises:
        MalformedRequestError: The body is neither JSON nor, for a request that may have tensors, msgpack; or no form.
        PayloadTooLargeError: It is longer than the server accepts.
        SlowRequestError: It does not come to an end in time.
        InvalidRequestError: A value breaks a rule; named as the wire has it.
        CancelledRequestError: Its client has gone.
        ShuttingDownError: The engine stops.
    """
    config = state.config
    media_type = check_media_type(request.headers, _MEDIA_TYPES.get(model, (JSON, MSGPACK)))
    body = await _receive(request, _most_bytes(state, media_type, model), config.receive_timeout_s)

    def sent() -> dict[str, Any]:
        if media_type == FORM:
            return parse_form_body(body, request.headers["content-type"], model, "image")
        parse_body = parse_json_body if media_type == JSON else parse_msgpack_body
        return parse_body(body, max_plain_bytes=config.max_body_bytes)

    async with state.planning:
        await state.check_wanted(request)
        # On a thread: a long prompt or a thousand sigmas take milliseconds, which the event loop owes to others.
        return await run_in_threadpool(_plan, state.engine.facts, model, sent, context_of(request))


def _most_bytes(state: AppState, media_type: str, model: type[SamplingT]) -> int:
    """Returns the size of a request's body. It has room for the files of images, in JSON in base64, and for tensors."""
    config, info = state.config, state.engine.facts.info
    if media_type == MSGPACK:
        return config.max_score_body_bytes
    files = info.limits.max_image_bytes if info.max_images else 0
    most = config.max_body_bytes + (-(-files // 3) * 4 if media_type == JSON else files)
    # What is beside tensors is bounded once the body is here.
    has_tensors = media_type == JSON and model in (RolloutRequest, GenerateRequest)
    return max(most, config.max_score_body_bytes) if has_tensors else most


async def read_body(request: Request, state: AppState, max_bytes: int | None = None) -> bytearray:
    """Reads the body of a request that has to be JSON.

    Args:
        request: Its body is read here.
        state: The state of the app.
        max_bytes: Its size, if not `max_body_bytes`.

    Raises:
        MalformedRequestError: It is sent as something else.
        PayloadTooLargeError: It is longer than the server accepts.
        SlowRequestError: It does not come to an end in time.
    """
    check_media_type(request.headers, (JSON,))
    return await _receive(request, max_bytes or state.config.max_body_bytes, state.config.receive_timeout_s)


async def accept_control(request: Request, state: AppState, model: type[RequestT], *, is_optional: bool = False) -> RequestT:
    """Reads and parses a request that steers the server, of at most `MAX_CONTROL_BYTES`.

    Args:
        request: Its body is read here.
        state: The state of the app.
        model: What the body must be.
        is_optional: Whether no body is the same as an empty object.

    Raises:
        MalformedRequestError: The body is not JSON.
        PayloadTooLargeError: It is longer than that.
        SlowRequestError: It does not come to an end in time.
        InvalidRequestError: A value breaks a rule.
    """
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    sent: dict[str, Any] = {}
    if has_body or not is_optional:
        sent = parse_json_body(await read_body(request, state, min(MAX_CONTROL_BYTES, state.config.max_body_bytes)))
    return parse(model, sent)


async def accept_score_request(request: Request, state: AppState) -> ScorePlan:
    """Reads, decodes and checks a request for scores; see `accept_request`.

    Raises:
        MalformedRequestError: The body is not what its content type says.
        PayloadTooLargeError: It is longer than the server accepts.
        SlowRequestError: It does not come to an end in time.
        InvalidRequestError: A value breaks a rule; named as the wire has it.
        ShuttingDownError: The engine stops.
    """
    media_type = check_media_type(request.headers, (JSON, MSGPACK))
    body = await _receive(request, state.config.max_score_body_bytes, state.config.receive_timeout_s)
    context_of(request).request_bytes = len(body)
    async with state.planning:
        await state.check_wanted(request)
        return await run_in_threadpool(_plan_score, state.engine.facts, body, media_type, context_of(request))


def _plan_score(facts: EngineFacts, body: bytearray, media_type: str, context: RequestContext) -> ScorePlan:
    params = _with_id(decode_score_request(body, media_type), context)
    return plan_score(params, facts.model, facts.info.limits)


def _plan(
    facts: EngineFacts, model: type[SamplingT], sent: Callable[[], dict[str, Any]], context: RequestContext
) -> tuple[SamplingT, RequestPlan]:
    accepted = parse(model, sent())
    params = _with_id(accepted.to_params(), context)
    try:
        return accepted, plan_request(params, facts.model, facts.info.limits)
    except InvalidRequestError as error:
        raise accepted.as_wire_error(error) from None


def _with_id(params: ParamsT, context: RequestContext) -> ParamsT:
    """Returns the request with the id of its context, if it has none; otherwise the context gets the request's."""
    context.suppress_logs = params.suppress_logs
    if params.request_id is None:
        return replace(params, request_id=context.request_id)
    context.request_id = params.request_id
    return params


def check_media_type(headers: Headers, known: Sequence[str]) -> str:
    """Returns the body's media type, one of those known.

    Raises:
        UnsupportedMediaTypeError: It is sent as something else, or compressed.
    """
    sent = headers.get("content-type", "")
    media_type = sent.partition(";")[0].strip().lower()
    if media_type not in known:
        raise UnsupportedMediaTypeError(
            f"content-type must be {' or '.join(known)}, got {sent[:80] or 'none'}; send the request as {known[0]}.",
            field="content-type",
        )
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"content-encoding must be identity, got {encoding[:80]}; send the body uncompressed.", field="content-encoding"
        )
    return media_type


async def _receive(request: Request, max_bytes: int, timeout_s: float) -> bytearray:
    body = bytearray()
    async for chunk in bounded_stream(request, max_bytes, timeout_s):
        body += chunk
    return body


async def bounded_stream(request: Request, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """Yields the pieces of a body.

    Args:
        request: Whose body it is.
        max_bytes: The largest number of bytes.
        timeout_s: The seconds for the whole of it; every 64 KiB that came are another second.

    Raises:
        PayloadTooLargeError: It is longer.
        SlowRequestError: It does not come to an end in time.
    """
    if (declared := _declared_bytes(request.headers)) is not None and declared > max_bytes:
        raise _too_large(max_bytes, f"{declared} bytes")
    count, pieces = 0, request.stream()
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            # Around the wait alone: what is done with a piece is no fault of its sender.
            async with asyncio.timeout_at(deadline_s + count / _MIN_BODY_BYTES_PER_S):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise SlowRequestError(
                f"the body must come within {timeout_s:g} s and a second for every {_MIN_BODY_BYTES_PER_S} bytes, got {count} "
                "bytes and no end; send it faster."
            ) from None
        if piece is None:
            return
        # A chunked body declares nothing, so it is also counted as it comes.
        count += len(piece)
        if count > max_bytes:
            raise _too_large(max_bytes, "more")
        yield piece


def _declared_bytes(headers: Headers) -> int | None:
    """Returns the length that the request declares; None where there is none, or it is no number."""
    text = headers.get("content-length", "")
    # Python's int takes digits of every script, and no more than some thousand of them.
    if not (text.isascii() and text.isdigit()):
        return None
    return int(text[:_MAX_LENGTH_DIGITS])


def _too_large(max_bytes: int, got: str) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body must have at most {max_bytes} bytes, got {got}; send a smaller request.")
