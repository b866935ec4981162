"""A response body that is a list of buffers: its length is known up front, and its bytes are made only when they are sent."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

_MIN_CHUNK_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A span of a body.

    Attributes:
        data: The bytes before any base64.
        is_base64: Whether they are sent as base64. Padding appears where a segment ends, so a base64 segment is a whole text,
            or the last part of one.
        owner: The tensor that `data` belongs to, if it is one's storage.
    """

    data: bytes | memoryview
    is_base64: bool = False
    owner: Tensor | None = None

    @property
    def length(self) -> int:
        """Bytes as sent."""
        return -(-len(self.data) // 3) * 4 if self.is_base64 else len(self.data)

    def fitting(self, room: int) -> int:
        """How many bytes of `data` are at most `room` bytes as sent, without padding in their midst."""
        return room // 4 * 3 if self.is_base64 else room

    def piece(self, start: int, stop: int) -> bytes | memoryview:
        """`data[start:stop]` as sent."""
        part = memoryview(self.data)[start:stop]
        return binascii.b2a_base64(part, newline=False) if self.is_base64 else part


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBody:
    """An encoded answer.

    It refers to the storage of the tensors it was made from: do not write to them before it is sent.

    Attributes:
        content_type: Media type.
        segments: Its buffers in order.
    """

    content_type: str
    segments: tuple[Segment, ...]

    @property
    def content_length(self) -> int:
        """Bytes, exactly."""
        return sum(segment.length for segment in self.segments)

    def chunks(self, max_bytes: int = 1 << 20) -> Iterator[bytes]:
        """The body in pieces of at most `max_bytes`, so that no step copies (or encodes) more than that at a time."""
        assert max_bytes >= _MIN_CHUNK_BYTES
        parts: list[bytes | memoryview] = []
        room = max_bytes
        for segment in self.segments:
            start = 0
            while start < len(segment.data):
                stop = min(start + segment.fitting(room), len(segment.data))
                if stop == start:
                    yield b"".join(parts)
                    parts, room = [], max_bytes
                    continue
                parts.append(segment.piece(start, stop))
                room -= len(parts[-1])
                start = stop
        if parts:
            yield b"".join(parts)
