"""What both clients share: a call, and from its response a value or the exception that the server raised.

Nothing here does input or output.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import httpx
import msgspec

from flowroll.client.route import Proxy
from flowroll.errors import InvalidRequestError, QueueFullError, ServerConnectionError, error_from_wire
from flowroll.types import Number
from flowroll.wire.body import EncodedBody
from flowroll.wire.codec import JSON
from flowroll.wire.control import ErrorBody
from flowroll.wire.fields import Request

T = TypeVar("T")
DEFAULT_TIMEOUT_S = 600.0
READY_POLL_S = 0.2
_CONNECT_TIMEOUT_S = 10.0
_MAX_SHOWN_CHARS = 200


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


# What a method of a client does: one call; or several, by the answers to those before, and pauses in seconds.
Steps: TypeAlias = Generator["Call[Any] | float", Any, T]
Operation: TypeAlias = "Call[T] | Steps[T]"


async def _awaited(content: EncodedBody) -> AsyncIterator[bytes]:
    # A piece at a time, on a thread: it copies.
    pieces = content.chunks()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


_OBJECT = msgspec.json.Decoder(dict[str, Any])


def conclude(call: Call[T], response: httpx.Response, body: bytearray, proxy: Proxy | None = None) -> T:
    """The value of a whole response, which came through `proxy`.

    Raises:
        FlowrollError: The one that the server raised, with its class.
        ServerConnectionError: The answer is not flowroll's.
    """
    if response.is_success:
        return call.read(body, response.headers.get("content-type", ""))
    try:
        detail = msgspec.json.decode(body, type=ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        between = "any proxy in between" if proxy is None else str(proxy)
        raise ServerConnectionError(
            f"{response.url} must answer as a flowroll server, got HTTP {response.status_code} {excerpt(body)}; "
            f"check the URL, and {between}."
        ) from error
    raised = error_from_wire(detail.code, detail.message, detail.field)
    if isinstance(raised, QueueFullError):
        raised.retry_after_s = retry_after_s(response.headers.get("retry-after", ""), raised.retry_after_s)
    raise raised


def not_ready(timeout_s: Number, reason: Exception) -> ServerConnectionError:
    """The error of a server that did not become ready."""
    return ServerConnectionError(
        f"the server must be ready within {timeout_s:g} s, got ({reason}); look at its log, or wait longer for a large model."
    )


def post(path: str, sent: Request, read: Callable[[bytearray, str], T]) -> Call[T]:
    """POST of a request.

    Raises:
        InvalidRequestError: It holds what JSON does not have.
    """
    return Call(method="POST", path=path, read=read, content=encoded(sent))


def encoded(sent: Request | Mapping[str, Any]) -> bytes:
    """A request, or its fields, as JSON.

    Raises:
        InvalidRequestError: It holds what JSON does not have.
    """
    try:
        return msgspec.json.encode(sent)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
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
            f"the answer must be flowroll's JSON object, got {excerpt(body)}; check the URL."
        ) from error


def excerpt(body: bytearray) -> str:
    """The beginning of a body that is not as it should be."""
    return repr(bytes(body[:_MAX_SHOWN_CHARS]).decode(errors="replace"))


def retry_after_s(header: str, default_s: float) -> float:
    """Seconds of the Retry-After header; the default where it is absent or a date."""
    try:
        seconds = float(header)
    except ValueError:
        return default_s
    return seconds if math.isfinite(seconds) and seconds >= 0 else default_s
