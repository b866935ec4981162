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
        data: The bytes before any base64 encoding.
        is_base64: Whether the bytes are sent as base64. A segment ends with padding, so a base64 segment is a whole text or the
            last part of one.
        owner: The tensor to which `data` belongs, if it is a tensor's storage.
    """

    data: bytes | memoryview
    is_base64: bool = False
    owner: Tensor | None = None

    @property
    def length(self) -> int:
        """The number of bytes as sent."""
        return -(-len(self.data) // 3) * 4 if self.is_base64 else len(self.data)

    def fitting(self, room: int) -> int:
        """Returns how many bytes of `data` fit into `room` bytes as sent, without padding in the middle."""
        return room // 4 * 3 if self.is_base64 else room

    def piece(self, start: int, stop: int) -> bytes | memoryview:
        """Returns `data[start:stop]` as sent."""
        part = memoryview(self.data)[start:stop]
        return binascii.b2a_base64(part, newline=False) if self.is_base64 else part


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBody:
    """An encoded answer.

    It refers to the storage of the tensors from which it was made: do not write to them before it is sent.

    Attributes:
        content_type: The media type.
        segments: The buffers of the body in order.
    """

    content_type: str
    segments: tuple[Segment, ...]

    @property
    def content_length(self) -> int:
        """The exact number of bytes."""
        return sum(segment.length for segment in self.segments)

    @property
    def memory_bytes(self) -> int:
        """The number of bytes that the body takes in memory until it is sent; base64 is made only then."""
        return sum(len(segment.data) for segment in self.segments)

    def chunks(self, max_bytes: int = 1 << 20) -> Iterator[bytes]:
        """Yields the body in pieces of at most `max_bytes`, so that no step copies or encodes more at a time."""
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
