"""From the body of an HTTP request to tensors, without a second copy, and without holding up the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.weights.tensorstream import TensorStream
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
    check_media_type(request.headers, _OCTETS)
    stream = TensorStream(arrival.incoming)

    def take(pieces: list[bytes]) -> None:
        for piece in pieces:
            stream.feed(piece)

    try:
        async with _without_pause(idle_s) as go_on:
            async for pieces in _in_lots(bounded_stream(request, max_bytes, idle_s)):
                await run_in_threadpool(take, pieces)
                arrival.touch()
                go_on()
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
    check_media_type(request.headers, _OCTETS)
    try:
        with path.open("xb") as file:
            async with _without_pause(idle_s) as go_on:
                async for pieces in _in_lots(bounded_stream(request, max_bytes, idle_s)):
                    await run_in_threadpool(file.writelines, pieces)
                    go_on()
    except OSError as error:
        raise WeightsRejectedError(f"the body must find room on the disk, got {error.strerror}; make some.") from error


@contextlib.asynccontextmanager
async def _without_pause(idle_s: float) -> AsyncIterator[Callable[[], None]]:
    """Ends the block when what it gives was not called for so long.

    Raises:
        WeightsRejectedError: It was not.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(idle_s) as silence:
            yield lambda: silence.reschedule(loop.time() + idle_s)
    except TimeoutError:
        raise WeightsRejectedError(f"the body must arrive without a pause of {idle_s:g} s, got one; send it again.") from None


async def _in_lots(pieces: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The pieces in lists, each worth a change of threads."""
    lot, size = [], 0
    async for piece in pieces:
        lot.append(piece)
        size += len(piece)
        if size >= _LOT_BYTES:
            yield lot
            lot, size = [], 0
    yield lot
