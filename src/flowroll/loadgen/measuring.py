"""Measures answers as they arrive. Nothing of an answer is kept or decoded, however large it is."""

from __future__ import annotations

import contextlib
import re
from contextvars import ContextVar

import httpx
import msgspec

from flowroll.loadgen.report import OK, REJECTED, Outcome
from flowroll.wire.codec import JSON, MSGPACK

_DEFAULT_RETRY_S = 1.0
_MAX_ERROR_BYTES = 64 * 1024
# The key of a sample's image. In a JSON text the second quote of a prompt would be escaped.
_SAMPLE_KEYS = {JSON: b'"generated_output":', MSGPACK: b"\xb0generated_output"}


class MeasuringTransport(httpx.AsyncBaseTransport):
    """Sends requests and measures their answers. Its client gets an empty list of samples in place of each answer.

    Attributes:
        outcome: The outcome that the next request of this task fills in; counts of earlier attempts are added to.
    """

    def __init__(self) -> None:
        # Any number may be in flight: waiting for a connection of the client's own would be no latency of the server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._transport = httpx.AsyncHTTPTransport(limits=limits)
        self.outcome: ContextVar[Outcome] = ContextVar("outcome")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and reads its answer to the end."""
        outcome, error_body = self.outcome.get(), b""
        earlier_bytes = outcome.received_bytes
        outcome.status, outcome.code, outcome.samples, outcome.retry_after_s = None, OK, 0, 0.0
        # Uncompressed, so that servers that compress and servers that do not are measured on the same bytes.
        request.headers["accept-encoding"] = "identity"
        try:
            async with contextlib.aclosing(await self._transport.handle_async_request(request)) as answer:
                outcome.status = answer.status_code
                outcome.stages = stages_of(answer.headers.get("x-flowroll-timing", ""))
                media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
                key, tail = _SAMPLE_KEYS.get(media_type), b""
                async for piece in answer.aiter_bytes():
                    outcome.received_bytes = earlier_bytes + answer.num_bytes_downloaded
                    if not answer.is_success:
                        error_body += piece[: _MAX_ERROR_BYTES - len(error_body)]
                    elif key is not None:
                        outcome.samples += (tail + piece).count(key)
                        # Too short to contain the key once more.
                        tail = (tail + piece)[1 - len(key) :]
        except httpx.HTTPError as error:
            outcome.code, outcome.samples = type(error).__name__, 0
        else:
            if not answer.is_success:
                outcome.code = error_code(error_body)
            if outcome.status == REJECTED:
                outcome.rejections += 1
                outcome.retry_after_s = _seconds(answer.headers.get("retry-after", ""))
        return httpx.Response(200, json=[])

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._transport.aclose()


class _ErrorDetail(msgspec.Struct):
    code: str


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail


def error_code(body: bytes) -> str:
    """The code in an error's body; "unknown" where there is none, as from other servers or a proxy."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error.code[:80] or "unknown"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "unknown"


def stages_of(header: str) -> dict[str, float]:
    """Seconds by stage from `queue;dur=0.1, encode;dur=8.2`, which is in milliseconds."""
    found = re.findall(r"([\w-]+)(?:;[^;,]*)*;dur=(\d+(?:\.\d+)?)", header[:1000])
    return {stage: float(milliseconds) / 1000 for stage, milliseconds in found}


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header; a default where it is absent or a date."""
    return float(retry_after) if re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after) else _DEFAULT_RETRY_S
