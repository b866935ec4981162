"""What both clients share: from arguments to a call, and from a response to a value or the exception that the server raised.

Nothing here does input or output.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from os import PathLike
from typing import Any, Generic, Literal, NoReturn, TypeAlias, TypeVar

import httpx
import msgspec

from flowroll.errors import InvalidRequestError, QueueFullError, ServerConnectionError, error_from_wire
from flowroll.replay.remote import score_params, scores_of
from flowroll.replay.scoring import Scores
from flowroll.types import (
    AdapterChange,
    GeneratedImage,
    LoraAdapter,
    MemoryChange,
    Number,
    Rollout,
    SamplingParams,
    WeightUpdate,
)
from flowroll.wire.body import EncodedBody
from flowroll.wire.codec import JSON, MSGPACK, WireFormat, decode_images, decode_rollouts
from flowroll.wire.names import (
    ADAPTERS_ROUTE,
    CHECKSUM_ROUTE,
    EXTRA,
    EXTRA_ONLY,
    GENERATE_ROUTE,
    LOAD_ADAPTER_ROUTE,
    PARAM_TO_WIRE,
    RELEASE_ROUTE,
    RESUME_ROUTE,
    ROLLOUT_ROUTE,
    SCORE_ROUTE,
    UNLOAD_ADAPTER_ROUTE,
    UPDATE_FROM_DISK_ROUTE,
    VERIFY_ROUTE,
    closest,
)
from flowroll.wire.scoring import decode_score_answer, encode_score_request

T = TypeVar("T")
UpdateMode: TypeAlias = Literal["drain", "abort"]

DEFAULT_TIMEOUT_S = 600.0
READY_POLL_S = 0.2
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 5.0
_MAX_SHOWN_CHARS = 200
_MAX_PORT = 65535
_ACCEPT: Mapping[WireFormat, str] = {"json": JSON, "msgpack": MSGPACK}
_PARAMS = {field.name: field for field in fields(SamplingParams)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request, and how its answer is read.

    Attributes:
        method: HTTP method.
        path: Below the server's URL.
        read: Makes the value of the body of a successful answer, which it may take over, and its content type.
        accept: Media type asked for.
        content: Body.
        content_type: Its media type.
        timeout_s: Longest silence of the server; None: the client's.
    """

    method: str
    path: str
    read: Callable[[bytearray, str], T]
    accept: str = JSON
    content: bytes | EncodedBody | None = None
    content_type: str = JSON
    timeout_s: Number | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of this call."""
        headers = {"Accept": self.accept}
        if self.content is not None:
            headers["Content-Type"] = self.content_type
        if isinstance(self.content, EncodedBody):
            headers["Content-Length"] = str(self.content.content_length)
        return headers

    def body(self) -> bytes | Iterator[bytes] | None:
        """The body for a transport that does not await."""
        return self.content.chunks() if isinstance(self.content, EncodedBody) else self.content

    def async_body(self) -> bytes | AsyncIterator[bytes] | None:
        """The body for one that does."""
        return _awaited(self.content) if isinstance(self.content, EncodedBody) else self.content

    def timeout(self, default_s: Number) -> httpx.Timeout:
        """The timeouts of this call."""
        seconds = default_s if self.timeout_s is None else self.timeout_s
        return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT_S))


async def _awaited(content: EncodedBody) -> AsyncIterator[bytes]:
    # A piece at a time, on a thread: it copies.
    pieces = content.chunks()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


class _ErrorDetail(msgspec.Struct, frozen=True):
    code: str
    message: str
    field: str | None = None


class _Verified(msgspec.Struct, frozen=True):
    num_tensors: int


class _Adapters(msgspec.Struct, frozen=True):
    adapters: list[LoraAdapter]


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorDetail


_OBJECT = msgspec.json.Decoder(dict[str, Any])
UPDATE = msgspec.json.Decoder(WeightUpdate)
CHANGE = msgspec.json.Decoder(AdapterChange)
_ADAPTERS = msgspec.json.Decoder(_Adapters)
_MEMORY = msgspec.json.Decoder(MemoryChange)
_SUMS = msgspec.json.Decoder(dict[str, str])
_VERIFIED = msgspec.json.Decoder(_Verified)


def rollout_call(params: SamplingParams | None, values: Mapping[str, Any], wire_format: WireFormat) -> Call[list[Rollout]]:
    """POST /rollout/generate.

    Raises:
        InvalidRequestError: A value breaks a rule that needs no model.
    """
    body = _request_body(_given(params, values))
    return Call(method="POST", path=ROLLOUT_ROUTE, read=decode_rollouts, accept=_ACCEPT[wire_format], content=body)


def generate_call(
    params: SamplingParams | None, values: Mapping[str, Any], wire_format: WireFormat
) -> Call[list[GeneratedImage]]:
    """POST /generate.

    Raises:
        InvalidRequestError: A value breaks a rule that needs no model.
    """
    given = _given(params, values)
    if params is not None:
        # Plain generation by definition; the route knows no such field.
        given.pop("rollout", None)
    body = _request_body(given)
    return Call(method="POST", path=GENERATE_ROUTE, read=decode_images, accept=_ACCEPT[wire_format], content=body)


def update_from_disk_call(
    path: str | PathLike[str], module: str, weight_version: str | None, mode: UpdateMode
) -> Call[WeightUpdate]:
    """POST /update_weights_from_disk."""
    sent = {"model_path": str(path), "module": module, "weight_version": weight_version, "mode": mode}
    return post(UPDATE_FROM_DISK_ROUTE, sent, lambda body, _: read_by(UPDATE, body))


def load_adapter_call(name: str, path: str | PathLike[str], merged: bool, weight_version: str | None) -> Call[AdapterChange]:
    """POST /load_lora_adapter."""
    sent = {"lora_name": name, "lora_path": str(path), "merged": merged, "weight_version": weight_version}
    return post(LOAD_ADAPTER_ROUTE, sent, lambda body, _: read_by(CHANGE, body))


def unload_adapter_call(name: str, weight_version: str | None) -> Call[AdapterChange]:
    """POST /unload_lora_adapter."""
    sent = {"lora_name": name, "weight_version": weight_version}
    return post(UNLOAD_ADAPTER_ROUTE, sent, lambda body, _: read_by(CHANGE, body))


def adapters_call() -> Call[list[LoraAdapter]]:
    """GET /lora_adapters."""
    return Call(method="GET", path=ADAPTERS_ROUTE, read=lambda body, _: read_by(_ADAPTERS, body).adapters)


def release_memory_call(mode: str) -> Call[MemoryChange]:
    """POST /release_memory_occupation."""
    return post(RELEASE_ROUTE, {"mode": mode}, lambda body, _: read_by(_MEMORY, body))


def resume_memory_call() -> Call[MemoryChange]:
    """POST /resume_memory_occupation."""
    return post(RESUME_ROUTE, {}, lambda body, _: read_by(_MEMORY, body))


def checksum_call(module: str) -> Call[str]:
    """POST /get_weights_checksum."""
    return post(CHECKSUM_ROUTE, {"module_names": [module]}, lambda body, _: _read_sum(body, module))


def verify_call(expected: Mapping[str, str], module: str) -> Call[int]:
    """POST /verify_weights."""
    sent = {"module": module, "expected": dict(expected)}
    return post(VERIFY_ROUTE, sent, lambda body, _: read_by(_VERIFIED, body).num_tensors)


def score_call(
    rollouts: Sequence[Rollout],
    steps: Sequence[int] | None,
    log_probs_only: bool,
    min_weight_version: str | None,
    wire_format: WireFormat,
) -> Call[Scores]:
    """POST /rollout/score.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    params = score_params(rollouts, steps, log_probs_only=log_probs_only, min_weight_version=min_weight_version)
    body = encode_score_request(params, wire_format=wire_format)
    asked = [sample.steps for sample in params.samples]

    def read(answer_body: bytearray, content_type: str) -> Scores:
        answer = decode_score_answer(answer_body, content_type)
        if [sample.steps for sample in answer.samples] != asked:
            raise ServerConnectionError("the answer must hold the scores that were asked for, got others; retry.")
        return scores_of(answer)

    content = b"".join(body.chunks())
    accept = _ACCEPT[wire_format]
    return Call(method="POST", path=SCORE_ROUTE, read=read, accept=accept, content=content, content_type=body.content_type)


def object_call(path: str) -> Call[dict[str, Any]]:
    """GET of a route that answers with a JSON object."""
    return Call(method="GET", path=path, read=read_object)


def models_call() -> Call[list[dict[str, Any]]]:
    """GET /v1/models."""
    return Call(method="GET", path="/v1/models", read=_read_models)


def metrics_call() -> Call[str]:
    """GET /metrics."""
    return Call(method="GET", path="/metrics", read=_read_text, accept="text/plain")


def readiness_call(remaining_s: Number) -> Call[dict[str, Any]]:
    """GET /readiness, without waiting for a server that does not answer at all."""
    return Call(method="GET", path="/readiness", read=read_object, timeout_s=min(max(remaining_s, 0.1), _PROBE_TIMEOUT_S))


def client_options(base_url: str, api_key: str | None) -> dict[str, Any]:
    """What both httpx clients are made with.

    Raises:
        InvalidRequestError: The URL or the key cannot be used in HTTP.
    """
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise InvalidRequestError(f"base_url must be a URL, got {base_url!r} ({error}); use http://host:port.") from error
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > _MAX_PORT:
        raise InvalidRequestError(f"base_url must be an http or https URL of a host, got {base_url!r}; use http://host:port.")
    if api_key is None:
        return {"base_url": url}
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidRequestError("api_key must be printable ASCII, got other characters; use the server's --api-key.")
    return {"base_url": url, "headers": {"Authorization": f"Bearer {api_key}"}}


def conclude(call: Call[T], response: httpx.Response, body: bytearray) -> T:
    """The value of a whole response.

    Raises:
        FlowrollError: The one that the server raised, with its class.
        ServerConnectionError: The answer is not flowroll's.
    """
    if response.is_success:
        return call.read(body, response.headers.get("content-type", ""))
    try:
        detail = msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServerConnectionError(
            f"{response.url} must answer as a flowroll server, got HTTP {response.status_code} {_excerpt(body)}; "
            "check the URL, and any proxy in between."
        ) from error
    raised = error_from_wire(detail.code, detail.message, detail.field)
    if isinstance(raised, QueueFullError):
        raised.retry_after_s = retry_after_s(response.headers.get("retry-after", ""), raised.retry_after_s)
    raise raised


def raise_connection_error(error: httpx.HTTPError, base_url: httpx.URL) -> NoReturn:
    """Re-raises a failure of the transport.

    Raises:
        ServerConnectionError: Always.
    """
    remedy = "start it with `flowroll serve`, or check the URL"
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        remedy = "ask for less at a time, or raise timeout_s"
    elif isinstance(error, httpx.PoolTimeout):
        remedy = "send fewer requests at a time"
    elif isinstance(error, httpx.ReadError | httpx.RemoteProtocolError):
        remedy = "look at the server's log, and retry"
    reason = f"{type(error).__name__} {error}".strip()
    raise ServerConnectionError(f"the server at {base_url} must answer, got {reason}; {remedy}.") from error


def not_ready(timeout_s: Number, reason: Exception) -> ServerConnectionError:
    """The error of a server that did not become ready."""
    return ServerConnectionError(
        f"the server must be ready within {timeout_s:g} s, got ({reason}); look at its log, or wait longer for a large model."
    )


def _given(params: SamplingParams | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters to send, by the names of `SamplingParams`: those given, or those that differ from the defaults."""
    if params is not None:
        if values:
            raise InvalidRequestError("params must be given alone, got further fields; set them in SamplingParams.")
        return {
            name: getattr(params, name)
            for name, field in _PARAMS.items()
            if field.default is MISSING or getattr(params, name) != field.default
        }
    for name in values:
        if name not in _PARAMS:
            guess = closest(name, _PARAMS)
            remedy = f"use {guess} if that is meant" if guess else f"use one of {', '.join(_PARAMS)}"
            raise InvalidRequestError(f"{name} must be a field of SamplingParams, got an unknown name; {remedy}.", field=name)
    if "prompt" not in values:
        raise InvalidRequestError("prompt must be given, got nothing; send one prompt as text.", field="prompt")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    SamplingParams(**given)
    return given


def post(path: str, sent: Mapping[str, Any], read: Callable[[bytearray, str], T]) -> Call[T]:
    """POST of a JSON object."""
    return Call(method="POST", path=path, read=read, content=msgspec.json.encode(sent))


def _request_body(given: Mapping[str, Any]) -> bytes:
    sent: dict[str, Any] = {PARAM_TO_WIRE.get(name, name): value for name, value in given.items() if name not in EXTRA_ONLY}
    if extra := {name: value for name, value in given.items() if name in EXTRA_ONLY}:
        sent[EXTRA] = extra
    try:
        return msgspec.json.encode(sent)
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"the request must hold plain values, got {error}; convert it.") from error


def read_object(body: bytearray, content_type: str) -> dict[str, Any]:
    """The JSON object of an answer."""
    return read_by(_OBJECT, body)


def read_by(decoder: msgspec.json.Decoder[T], body: bytearray) -> T:
    """What a decoder makes of a JSON answer.

    Raises:
        ServerConnectionError: The answer is not flowroll's.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServerConnectionError(
            f"the answer must be flowroll's JSON object, got {_excerpt(body)}; check the URL."
        ) from error


def _read_sum(body: bytearray, module: str) -> str:
    digest = read_by(_SUMS, body).get(module)
    if digest is None:
        raise ServerConnectionError(f"the answer must hold the sum of {module}, got {_excerpt(body)}; check the URL.")
    return digest


def _read_models(body: bytearray, content_type: str) -> list[dict[str, Any]]:
    models = read_object(body, content_type).get("data")
    if not isinstance(models, list):
        raise ServerConnectionError(f"the answer must list models in data, got {_excerpt(body)}; check the URL.")
    return models


def _read_text(body: bytearray, content_type: str) -> str:
    return body.decode(errors="replace")


def _excerpt(body: bytearray) -> str:
    return repr(bytes(body[:_MAX_SHOWN_CHARS]).decode(errors="replace"))


def retry_after_s(header: str, default_s: float) -> float:
    """Seconds of the Retry-After header; the default where it is absent or a date."""
    try:
        seconds = float(header)
    except ValueError:
        return default_s
    return seconds if math.isfinite(seconds) and seconds >= 0 else default_s
