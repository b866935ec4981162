"""What an answer is, learned while it passes by: nothing of a body is kept, however large it is."""

from __future__ import annotations

import math

import msgspec

from flowroll.wire.codec import JSON, MSGPACK

# A key and its colon: inside a JSON text the second quote would be escaped.
_KEY = b'"generated_output":'
_MAX_STAGES = 32
UNKNOWN = "unknown"


class Counter:
    """Counts the samples of an answer; this one finds none."""

    def add(self, piece: bytes) -> None:
        """Takes the next piece of the body."""

    def total(self) -> int:
        """Samples so far; those of the whole answer after the last piece."""
        return 0


class _JsonSamples(Counter):
    def __init__(self) -> None:
        self._end, self._count = b"", 0

    def add(self, piece: bytes) -> None:
        joined = self._end + piece
        self._count += joined.count(_KEY)
        # Too short to hold the key once more.
        self._end = joined[-(len(_KEY) - 1) :]

    def total(self) -> int:
        return self._count


class _MsgpackSamples(Counter):
    """A list in msgpack begins with its length."""

    def __init__(self) -> None:
        self._head = b""

    def add(self, piece: bytes) -> None:
        if len(self._head) < 5:
            self._head += piece[: 5 - len(self._head)]

    def total(self) -> int:
        kind = self._head[0] if self._head else 0
        if 0x90 <= kind <= 0x9F:
            return kind - 0x90
        size = {0xDC: 2, 0xDD: 4}.get(kind, 0)
        return int.from_bytes(self._head[1 : 1 + size])


def sample_counter(content_type: str) -> Counter:
    """A counter for an answer of this type; one that finds nothing where no list of samples can be in it."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == MSGPACK:
        return _MsgpackSamples()
    return _JsonSamples() if media_type == JSON else Counter()


def stages_of(header: str) -> dict[str, float]:
    """Seconds by stage from `queue;dur=0.1, encode;dur=8.2`, in milliseconds; empty where there is no such header."""
    stages: dict[str, float] = {}
    for entry in header.split(",")[:_MAX_STAGES]:
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key == "dur" and (milliseconds := _number(value)) is not None:
                stages[name] = milliseconds / 1000
    return stages


def error_code(body: bytes) -> str:
    """The code in an error's body; "unknown" where there is none, as from other servers or a proxy."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNKNOWN
    detail = parsed.get("error") if isinstance(parsed, dict) else None
    code = detail.get("code") if isinstance(detail, dict) else None
    return code[:80] if isinstance(code, str) and code else UNKNOWN


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
