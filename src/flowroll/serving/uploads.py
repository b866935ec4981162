"""From the body of an HTTP request to tensors, without a second copy, and without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from flowroll.engine.adapters.files import AdapterFiles, files_in_memory
from flowroll.engine.service import EngineClient, EngineService, SharedMemory, UpdateProgress, bucket_bytes, bucket_tensors
from flowroll.errors import WeightsRejectedError
from flowroll.serving.parsing import bounded_stream, check_media_type
from flowroll.serving.weight_uploads import WeightUpload
from flowroll.types.tensors import tensor_bytes
from flowroll.wire.safetensors import LENGTH_BYTES, BlobError, StoredTensor, TensorStream, broken_header, header_metadata

# So much is handed to a thread at a time: the copy then takes longer than the change of threads.
_LOT_BYTES = 4 * 2**20
# The text of adapter_config.json in the metadata of a body.
_CONFIG_KEY = "adapter_config"
_OCTETS = ("application/octet-stream", "application/safetensors")


class BucketStream(TensorStream):
    """A bucket that arrives as the pieces of a safetensors body, into memory that the engine shares.

    Ends with `finish` and `put`, or with `drop`; used by one thread at a time.

    Args:
        engine: Looks at the header as soon as that is here, before any data is.
        update_id: The update that the bucket is part of.
    """

    def __init__(self, engine: EngineClient, update_id: str) -> None:
        super().__init__(self._claim)
        self._engine, self._update_id = engine, update_id
        self._heads: list[StoredTensor] | None = None
        self._memory: SharedMemory | None = None

    def put(self) -> UpdateProgress:
        """Adds the bucket to what has arrived, once the body has ended.

        Raises:
            WeightsRejectedError: It is not whole, or the update has ended meanwhile.
        """
        self.finish()
        assert self._heads is not None and self._memory is not None
        heads, self._heads = self._heads, None
        return self._engine.call(EngineService.put_bucket, self._update_id, heads, self._memory).result()

    def drop(self) -> None:
        """Forgets the bucket; its tensors may come again in another. Without effect on one that was added."""
        if self._heads is not None:
            self._engine.call(EngineService.drop_bucket, self._update_id, self._heads)

    def _claim(self, heads: list[StoredTensor]) -> list[Tensor]:
        self._engine.call(EngineService.claim_bucket, self._update_id, heads).result()
        self._heads = heads
        self._memory = _memory_of(bucket_bytes(heads))
        return bucket_tensors(self._memory.bytes, heads)


async def read_bucket(
    request: Request, engine: EngineClient, upload: WeightUpload, *, max_bytes: int, idle_s: float
) -> UpdateProgress:
    """Reads a safetensors body into memory that the engine shares, and has the engine take it.

    Args:
        request: Its body is read here.
        engine: Whose weights they are.
        upload: The update that the bucket is part of.
        max_bytes: Size of the body.
        idle_s: Longest pause in it.

    Raises:
        WeightsRejectedError: It is not whole, stalls, or holds what is not wanted. Nothing is left of the bucket.
        PayloadTooLargeError: It is longer than `max_bytes`.
        UnsupportedMediaTypeError: It is sent as something else.
    """
    stream = BucketStream(engine, upload.update_id)
    try:
        async for lot in _lots(request, max_bytes, idle_s):
            await run_in_threadpool(_feed, stream, lot)
            upload.touch()
        return await run_in_threadpool(stream.put)
    finally:
        upload.touch()
        stream.drop()


class AdapterStream(TensorStream):
    """An adapter that arrives as the pieces of a safetensors body, into memory that holds the whole file.

    Args:
        engine: Looks at the header and the configuration in it as soon as they are here, before any data is.
        name: The name of the adapter.
        merged: Whether it will be added to a copy of the weights.
    """

    def __init__(self, engine: EngineClient, name: str, *, merged: bool) -> None:
        super().__init__(self._check)
        self._engine, self._name, self._merged = engine, name, merged
        self._config = ""
        self._memory: SharedMemory | None = None

    @property
    def files(self) -> AdapterFiles:
        """The adapter, once the body has ended."""
        assert self._memory is not None
        return files_in_memory(self._memory, self._config)

    def _check(self, stored: list[StoredTensor]) -> list[Tensor]:
        try:
            config = header_metadata(self.header).get(_CONFIG_KEY)
        except BlobError as error:
            raise WeightsRejectedError(broken_header("the body", error, "send it again")) from error
        if config is None:
            raise WeightsRejectedError(
                f"the body must carry {_CONFIG_KEY} in its metadata, got none; send adapter_config.json as that.",
                field="lora_path",
            )
        self._config = config
        self._engine.call(EngineService.check_adapter, config, stored, self._name, merged=self._merged).result()
        start = LENGTH_BYTES + len(self.header)
        end = stored[-1].stop if stored else start
        self._memory = _memory_of(end)
        tensor_bytes(self._memory.bytes)[:start] = len(self.header).to_bytes(LENGTH_BYTES, "little") + self.header
        return [self._memory.bytes[start:end]]


async def read_adapter(request: Request, stream: AdapterStream, *, max_bytes: int, idle_s: float) -> None:
    """Reads the body of an adapter.

    Args:
        request: Its body is read here.
        stream: Takes it.
        max_bytes: Size of the body.
        idle_s: Longest pause in it.

    Raises:
        WeightsRejectedError: It is not whole, stalls, or is refused by its header.
        PayloadTooLargeError: It is longer than `max_bytes`.
        UnsupportedMediaTypeError: It is sent as something else.
    """
    async for lot in _lots(request, max_bytes, idle_s):
        await run_in_threadpool(_feed, stream, lot)
    stream.finish()


def _memory_of(num_bytes: int) -> SharedMemory:
    try:
        return SharedMemory.create(num_bytes)
    except OSError as error:
        raise WeightsRejectedError(f"the body must find room in memory, got {error.strerror}; send less.") from error


def _feed(stream: TensorStream, lot: list[bytes]) -> None:
    for piece in lot:
        stream.feed(piece)


async def _lots(request: Request, max_bytes: int, idle_s: float) -> AsyncIterator[list[bytes]]:
    """Yields the pieces of a body in lists, each worth a change of threads.

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
