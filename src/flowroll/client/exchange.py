"""What both clients share: a call, and how its response becomes a value or the exception that the server raised.

This module does no input or output.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import httpx
import msgspec

from flowroll.client.bounds import MAX_OBJECT_BYTES, Deadline
from flowroll.client.route import Proxy
from flowroll.errors import InvalidRequestError, QueueFullError, ServerConnectionError, error_from_wire
from flowroll.types import Number
from flowroll.wire.body import EncodedBody
from flowroll.wire.codec import JSON
from flowroll.wire.control import ErrorBody
from flowroll.wire.fields import Request

T = TypeVar("T")
DEFAULT_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0
_MAX_SHOWN_CHARS = 200
_MAX_RETRY_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One HTTP request, and how its answer is read.

    Attributes:
        method: The HTTP method.
        path: The path below the server's URL.
        read: Makes the value from the body of a successful answer, which it may keep, and from its content type.
        accept: The media type that the client asks for.
        content: The body of the request.
        content_type: The media type of the body.
        timeout_s: The longest silence of the server, in seconds; None: the client's own value.
        max_bytes: The most bytes of the answer; None: the client's own value.
        image_steps: The number of denoising steps of all samples together, if any server may run it; None: it is for one.
    """

    method: str
    path: str
    read: Callable[[bytearray, str], T]
    accept: str = JSON
    content: bytes | EncodedBody | None = None
    content_type: str = JSON
    timeout_s: Number | None = None
    max_bytes: int | None = MAX_OBJECT_BYTES
    image_steps: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Returns the headers of this call."""
        # Said, because httpx would ask for compressed answers, which can unpack to any size.
        headers = {"Accept": self.accept, "Accept-Encoding": "identity"}
        if self.content is not None:
            headers["Content-Type"] = self.content_type
        if isinstance(self.content, EncodedBody):
            headers["Content-Length"] = str(self.content.content_length)
        return headers

    def body(self, deadline: Deadline) -> bytes | Iterator[bytes] | None:
        """Returns the body for a synchronous transport, which is sent until the deadline."""
        return deadline.bounded(self.content.chunks()) if isinstance(self.content, EncodedBody) else self.content

    def async_body(self) -> bytes | AsyncIterator[bytes] | None:
        """Returns the body for an asynchronous transport."""
        return _awaited(self.content) if isinstance(self.content, EncodedBody) else self.content

    def timeout(self, default_s: Number, total_s: Number = math.inf) -> httpx.Timeout:
        """Returns the timeouts of this call, which may take `total_s` in all."""
        seconds = min(default_s if self.timeout_s is None else self.timeout_s, total_s)
        return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT_S))


# What a method of a client does: one call; or several, by the answers to those before, and pauses in seconds.
Steps: TypeAlias = Generator["Call[Any] | float", Any, T]
Operation: TypeAlias = "Call[T] | Steps[T]"


def for_any_server(operation: Operation[T]) -> Call[T]:
    """Returns a call that any one of several servers may answer.

    Raises:
        InvalidRequestError: It changes a server, or is about one.
    """
    if not isinstance(operation, Call) or operation.image_steps is None:
        raise InvalidRequestError(
            "a client of several servers must be asked for rollouts, images or scores, got another call; call it for each of "
            "client.servers.",
            field="base_url",
        )
    return operation


async def _awaited(content: EncodedBody) -> AsyncIterator[bytes]:
    # A piece at a time, on a thread: it copies.
    pieces = content.chunks()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def conclude(call: Call[T], response: httpx.Response, body: bytearray, proxy: Proxy | None = None) -> T:
    """Returns the value of a complete response, which came through `proxy`, or raises the server's error.

    Raises:
        FlowrollError: The server raised this error; it has the same class here.
        ServerConnectionError: The answer is not one of a flowroll server.
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


def post(path: str, sent: Request, read: Callable[[bytearray, str], T]) -> Call[T]:
    """Makes the call that posts a request.

    Raises:
        InvalidRequestError: The request holds a value that JSON cannot represent.
    """
    return Call(method="POST", path=path, read=read, content=encoded(sent))


def encoded(sent: Request | Mapping[str, Any]) -> bytes:
    """Encodes a request, or its fields, as JSON.

    Raises:
        InvalidRequestError: The request holds a value that JSON cannot represent.
    """
    try:
        return msgspec.json.encode(sent)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequestError(f"the request must hold plain values, got {error}; convert it.") from error


def excerpt(body: bytearray) -> str:
    """Returns the beginning of an unexpected body, for an error message."""
    return repr(bytes(body[:_MAX_SHOWN_CHARS]).decode(errors="replace"))


def reader(decoder: msgspec.json.Decoder[T]) -> Callable[[bytearray, str], T]:
    """Returns what reads a JSON answer with a decoder; it raises a `ServerConnectionError` where that cannot be read."""

    def read(body: bytearray, content_type: str) -> T:
        try:
            return decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ServerConnectionError(
                f"the answer must be flowroll's JSON object, got {excerpt(body)}; check the URL."
            ) from error

    return read


read_object = reader(msgspec.json.Decoder(dict[str, Any]))


def retry_after_s(header: str, default_s: float) -> float:
    """Returns the seconds of the Retry-After header, an hour at most, or the default where it is absent or a date."""
    try:
        seconds = float(header)
    except ValueError:
        return default_s
    return min(seconds, _MAX_RETRY_S) if math.isfinite(seconds) and seconds >= 0 else default_s
