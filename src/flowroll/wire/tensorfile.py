"""The safetensors format, written and read: as a tensor of an answer, as a body that arrives in pieces, and as a file.

Format: 8 bytes of little-endian header length, a JSON header padded with spaces, then the data of every tensor, without gaps.

The safetensors library maps files, and copies what it writes and what it reads from a body. Here nothing is copied: data is
taken from `types.tensors.tensor_bytes` and put there. Files are read with plain reads: a mapped file that somebody truncates
ends the process with a bus error, and one that is written again changes under the weights. A read into memory of our own fails
with an error, and puts tensors where the allocator would.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from torch import Tensor

from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.types.tensors import tensor_bytes

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U16": 2, "U32": 4, "U64": 8}
_LENGTH_BYTES = 8
# As many as torch has; the product of a million numbers would take minutes, in which Python does nothing else.
_MAX_DIMS = 64
_MAX_FILE_HEADER = 100 * 2**20
# Several times what the names and shapes of the largest models take.
_MAX_STREAM_HEADER = 16 * 2**20
_MOST_SHOWN = 200
# Smaller views into a shared body are copied, so that a kept log-prob does not keep the whole answer in memory.
_MIN_SHARED_BYTES = 1 << 20


class BlobError(ValueError):
    """Bytes that are not the safetensors data they should be; the text tells why, or is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHead:
    """A tensor without its data.

    Attributes:
        name: Its key.
        dtype: As safetensors names it, e.g. "BF16".
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(TensorHead):
    """A tensor of a file.

    Attributes:
        start: Where its bytes begin in the file.
        stop: Where they end.
    """

    start: int
    stop: int


def safetensors_prefix(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, multiple: int = _LENGTH_BYTES
) -> bytes:
    """All that comes before the data of these tensors, which follow in this order without gaps.

    Args:
        tensors: By name.
        metadata: Free text for the header.
        multiple: The prefix is padded to a multiple of so many bytes, itself a multiple of 8.

    Raises:
        KeyError: A dtype that cannot be written.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = msgspec.json.encode(header)
    text += b" " * (-(_LENGTH_BYTES + len(text)) % multiple)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(raw: bytes | bytearray | memoryview) -> list[StoredTensor]:
    """The tensors that a header names, in the order of their data, which has no gap. The time is linear in its length.

    Args:
        raw: The header, without the eight bytes before it that tell its length.

    Raises:
        BlobError: It is no such header, or one of its tensors does not have as many bytes as its shape says.
    """
    end = _LENGTH_BYTES + len(raw)
    try:
        entries = json.loads(str(raw, "utf-8"), object_pairs_hook=_without_doubles)
        entries.pop("__metadata__", None)
        stored = [_stored_tensor(name, entry, end) for name, entry in entries.items()]
    except BlobError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BlobError from error
    stored.sort(key=lambda tensor: (tensor.start, tensor.stop))
    for tensor in stored:
        if tensor.start != end:
            raise BlobError(f"a gap or an overlap at {tensor.name[:_MOST_SHOWN]}")
        end = tensor.stop
    return stored


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two entries with the same name the JSON parser would drop one in silence."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BlobError(f"{name[:_MOST_SHOWN]} is there twice")
        found[name] = value
    return found


def _stored_tensor(name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    item_bytes = _ITEM_BYTES.get(entry["dtype"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)) or start > stop:
        raise ValueError("numbers must be natural")
    if len(shape) > _MAX_DIMS or (item_bytes is not None and stop - start != item_bytes * math.prod(shape)):
        raise BlobError(f"{entry['dtype']} data of {name[:_MOST_SHOWN]} does not fill shape {list(shape)[:8]}")
    return StoredTensor(name=name, dtype=entry["dtype"], shape=shape, start=begin + start, stop=begin + stop)


def tensor_from_blob(blob: memoryview | bytearray) -> Tensor:
    """The tensor "t" of a safetensors blob, which holds no other; writable.

    The data is not copied if it is writable, aligned, and either its own buffer or large.

    Args:
        blob: A `bytearray` is taken over; a `memoryview` is part of a larger body, which the tensor then keeps alive.

    Raises:
        BlobError: It is no such blob.
    """
    view = memoryview(blob)
    data_start = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    stored = read_header(view[_LENGTH_BYTES:data_start]) if data_start <= view.nbytes else []
    if [tensor.name for tensor in stored] != ["t"] or stored[0].dtype not in DTYPES or stored[0].stop > view.nbytes:
        raise BlobError('a safetensors blob must hold a tensor "t" of a known dtype, and all of its data')
    (tensor,) = stored
    dtype = DTYPES[tensor.dtype]
    try:
        if tensor.start == tensor.stop:
            return torch.empty(tensor.shape, dtype=dtype)
        return _as_tensor(view[tensor.start : tensor.stop], isinstance(blob, memoryview), dtype).view(tensor.shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise BlobError(f"a tensor of an impossible shape: {error}") from error


def _as_tensor(data: memoryview, is_shared: bool, dtype: torch.dtype) -> Tensor:
    """The bytes as a flat tensor, in place where that is safe."""
    if data.readonly or (is_shared and data.nbytes < _MIN_SHARED_BYTES):
        return torch.frombuffer(bytearray(data), dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype)


class TensorStream:
    """A body that arrives in pieces: the bytes of each tensor go straight to the memory that will hold it.

    Args:
        begin: Looks at the tensors as soon as the header is here, before any data is, and gives what has to be filled.
    """

    def __init__(self, begin: Callable[[list[StoredTensor]], Sequence[Tensor]]) -> None:
        self._begin = begin
        self._head = bytearray()
        self._num_tensors: int | None = None
        # Of the tensors that are not full, what is still to be filled, the next one last.
        self._rest: list[memoryview] = []

    def feed(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes.

        Raises:
            WeightsRejectedError: The header is none, or there are bytes behind the end; or whatever `begin` raises.
        """
        view = memoryview(piece)
        if self._num_tensors is None:
            view = self._take_head(view)
        while view:
            if not self._rest:
                raise WeightsRejectedError("the body must end with its last tensor, got more bytes; send it again.")
            target = self._rest[-1]
            count = min(len(target), len(view))
            target[:count] = view[:count]
            view = view[count:]
            if count < len(target):
                self._rest[-1] = target[count:]
            else:
                self._rest.pop()

    def finish(self) -> int:
        """Ends the body.

        Returns:
            How many tensors it held.

        Raises:
            WeightsRejectedError: It is not whole.
        """
        if self._num_tensors is None or self._rest:
            missing = f"{sum(map(len, self._rest))} bytes too few" if self._rest else "no whole header"
            raise WeightsRejectedError(f"the body must be a whole safetensors file, got {missing}; send it again.")
        return self._num_tensors

    def _take_head(self, view: memoryview) -> memoryview:
        """Takes what belongs to the header, begins once it is whole, and gives back the rest."""
        view = self._fill_head(view, _LENGTH_BYTES)
        if len(self._head) < _LENGTH_BYTES:
            return view
        length = int.from_bytes(self._head[:_LENGTH_BYTES], "little")
        try:
            if length > _MAX_STREAM_HEADER:
                raise BlobError
            view = self._fill_head(view, _LENGTH_BYTES + length)
            if len(self._head) < _LENGTH_BYTES + length:
                return view
            stored = read_header(self._head[_LENGTH_BYTES:])
        except BlobError as error:
            raise WeightsRejectedError(_broken("the body", error, "send it again")) from error
        views = [tensor_bytes(target) for target in self._begin(stored)]
        self._num_tensors = len(views)
        self._rest = [view for view in reversed(views) if len(view)]
        return view

    def _fill_head(self, view: memoryview, size: int) -> memoryview:
        count = max(0, size - len(self._head))
        self._head += view[:count]
        return view[count:]


def _broken(subject: str, error: BlobError, remedy: str) -> str:
    reason = f" ({error})" if str(error) else ""
    return f"{subject} must be a safetensors file, got a broken header{reason}; {remedy}."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What tells one save of a file from another without its data being read.

    Attributes:
        size: In bytes.
        mtime_ns: When it was last written to.
        header_sha256: Of its header.
        machine: That looked at it.
        inode: On that machine; a file that takes the place of another has one of its own.
    """

    size: int
    mtime_ns: int
    header_sha256: str
    machine: str
    inode: int

    def is_same_save(self, other: FileStamp) -> bool:
        """Whether both are of one save. Another machine may number the same file otherwise."""
        if self.machine == other.machine and self.inode != other.inode:
            return False
        return (self.size, self.mtime_ns, self.header_sha256) == (other.size, other.mtime_ns, other.header_sha256)


class TensorFile:
    """An open safetensors file whose header is whole and whose length is what the header says. A context manager.

    Args:
        path: A regular file.

    Attributes:
        path: The same.
        stored: Its tensors.
        stamp: What it was when it was opened.

    Raises:
        CheckpointError: No regular file, a header that is none, or another length.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Whoever waits for the other end of a pipe waits for ever; a regular file does not care.
        self._file: BinaryIO = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        try:
            self._status = self._look()
            self.stored, header_sha256 = self._read_header()
            self.stamp = FileStamp(
                size=self._status.st_size,
                mtime_ns=self._status.st_mtime_ns,
                header_sha256=header_sha256,
                machine=platform.node(),
                inode=self._status.st_ino,
            )
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, target: Tensor, start: int) -> None:
        """Fills a contiguous tensor on the CPU with the bytes from `start` on.

        Raises:
            CheckpointError: The file ends before.
            OSError: The disk fails.
        """
        view = tensor_bytes(target)
        self._file.seek(start)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]  # a raw file has it
            if not count:
                raise CheckpointError(f"{self.path} must be read to its end, got {start + done} bytes; copy the file again.")
            done += count

    def check_unchanged(self) -> None:
        """Refuses a file that was written to since it was opened: what was read may be half old, half new.

        Raises:
            CheckpointError: It was.
        """
        status = self._look()
        if (status.st_size, status.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise CheckpointError(f"{self.path} must stay as it is while it is read, got a change; save it, then ask again.")

    def _look(self) -> os.stat_result:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path} must be a regular file, got another kind; give a .safetensors file.")
        return status

    def _read_header(self) -> tuple[list[StoredTensor], str]:
        size = self._status.st_size
        length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
        raw = self._file.read(length) if 0 < length <= min(size - _LENGTH_BYTES, _MAX_FILE_HEADER) else b""
        try:
            stored = read_header(raw)
        except BlobError as error:
            raise CheckpointError(_broken(str(self.path), error, "copy the file again")) from error
        end = stored[-1].stop if stored else _LENGTH_BYTES + length
        if end != size:
            raise CheckpointError(f"{self.path} must be {end} bytes long, got {size}; the file is truncated, copy it again.")
        return stored, hashlib.sha256(raw).hexdigest()
