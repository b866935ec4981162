"""From the body of an HTTP request to tensors, without a second copy, and without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.weights.receiver import BucketStream
from flowroll.errors import WeightsRejectedError
from flowroll.serving.parsing import bounded_stream, check_media_type
from flowroll.serving.weight_updates import OpenUpdate

# So much is handed to a thread at a time: the copy then takes longer than the change of threads.
_LOT_BYTES = 4 * 2**20
_OCTETS = ("application/octet-stream", "application/safetensors")


async def read_bucket(request: Request, arrival: OpenUpdate, *, max_bytes: int, idle_s: float) -> int:
    """Reads a safetensors body into memory that the engine will hold.

    Args:
        request: Its body is read here.
        arrival: What the bucket is part of.
        max_bytes: Size of the body.
        idle_s: Longest pause in it.

    Returns:
        How many tensors it held.

    Raises:
        WeightsRejectedError: It is not whole, stalls, or holds what is not wanted. Nothing is left of the bucket.
        PayloadTooLargeError: It is longer than `max_bytes`.
        UnsupportedMediaTypeError: It is sent as something else.
    """
    stream = BucketStream(arrival.incoming)

    def take(pieces: list[bytes]) -> None:
        for piece in pieces:
            stream.feed(piece)

    try:
        async for lot in _lots(request, max_bytes, idle_s):
            await run_in_threadpool(take, lot)
            arrival.touch()
        return await run_in_threadpool(stream.finish)
    finally:
        arrival.touch()
        stream.drop()


async def save_body(request: Request, path: Path, *, max_bytes: int, idle_s: float) -> None:
    """Writes a safetensors body to a file.

    Args:
        request: Its body is read here.
        path: Of the new file.
        max_bytes: Size of the body.
        idle_s: Longest pause in it.

    Raises:
        WeightsRejectedError: It stalls, or there is no room for it.
        PayloadTooLargeError: It is longer than `max_bytes`.
        UnsupportedMediaTypeError: It is sent as something else.
    """
    try:
        with path.open("xb") as file:
            async for lot in _lots(request, max_bytes, idle_s):
                await run_in_threadpool(file.writelines, lot)
    except OSError as error:
        raise WeightsRejectedError(f"the body must find room on the disk, got {error.strerror}; make some.") from error


async def _lots(request: Request, max_bytes: int, idle_s: float) -> AsyncIterator[list[bytes]]:
    """The pieces of a body in lists, each worth a change of threads.

    Raises:
        WeightsRejectedError: A list took longer than `idle_s` to come.
        PayloadTooLargeError: The body is longer than `max_bytes`.
        UnsupportedMediaTypeError: It is sent as something else.
    """
    check_media_type(request.headers, _OCTETS)
    pieces = bounded_stream(request, max_bytes, idle_s)
    piece: bytes | None = b""
    while piece is not None:
        lot, size = [], 0
        try:
            async with asyncio.timeout(idle_s):
                while size < _LOT_BYTES and (piece := await anext(pieces, None)) is not None:
                    lot.append(piece)
                    size += len(piece)
        except TimeoutError:
            raise WeightsRejectedError(
                f"the body must arrive without a pause of {idle_s:g} s, got one; send it again."
            ) from None
        yield lot
