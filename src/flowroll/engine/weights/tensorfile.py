"""safetensors files, read with plain reads.

Not mapped: a mapped file that somebody truncates ends the process with a bus error, and one that is written again changes under
the weights. A read into memory of our own fails with an error, and puts tensors where the allocator would.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from flowroll.errors import CheckpointError
from flowroll.types.tensors import tensor_bytes

_MAX_HEADER = 100 * 2**20
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


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
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
        raw = self._file.read(length) if 0 < length <= min(size - 8, _MAX_HEADER) else b""
        stored = parse_header(raw, str(self.path), "copy the file again")
        end = stored[-1].stop if stored else 8 + length
        if end != size:
            raise CheckpointError(f"{self.path} must be {end} bytes long, got {size}; the file is truncated, copy it again.")
        return stored, hashlib.sha256(raw).hexdigest()


def parse_header(raw: bytes | bytearray, subject: str, remedy: str) -> list[StoredTensor]:
    """The tensors that the header of a safetensors file names, in the order of their data, which has no gap.

    Args:
        raw: The header, without the eight bytes before it that tell its length.
        subject: What a message is about.
        remedy: What it tells to do.

    Raises:
        CheckpointError: It is no such header.
    """
    end = 8 + len(raw)
    try:
        entries = json.loads(raw, object_pairs_hook=_no_doubles)
        entries.pop("__metadata__", None)
        stored = [_stored_tensor(name, entry, end) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f" ({error})" if isinstance(error, _DoubledError) else ""
        raise CheckpointError(f"{subject} must be a safetensors file, got a broken header{reason}; {remedy}.") from error
    stored.sort(key=lambda tensor: (tensor.start, tensor.stop))
    for tensor in stored:
        if tensor.start != end:
            reason = f" (a gap or an overlap at {tensor.name})"
            raise CheckpointError(f"{subject} must be a safetensors file, got a broken header{reason}; {remedy}.")
        end = tensor.stop
    return stored


class _DoubledError(ValueError):
    pass


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two entries with the same name the JSON parser would drop one in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise _DoubledError(f"{', '.join(doubled[:3])} is there twice")
    return found


def _stored_tensor(name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    item_bytes = _ITEM_BYTES.get(entry["dtype"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)) or start > stop:
        raise ValueError("numbers must be natural")
    if item_bytes is not None and stop - start != item_bytes * math.prod(shape):
        raise ValueError("a tensor must have as many bytes as its shape says")
    return StoredTensor(name=name, dtype=entry["dtype"], shape=shape, start=begin + start, stop=begin + stop)
