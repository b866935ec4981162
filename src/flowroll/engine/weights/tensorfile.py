"""Reads safetensors files with ordinary reads.

The safetensors library maps files into memory; here they are read. If a mapped file is truncated, the process ends with a bus
error, and if it is written again, the weights change. A read into allocated memory fails with an error instead, and the
tensors are aligned as the allocator aligns them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from flowroll.errors import CheckpointError
from flowroll.types.tensors import tensor_bytes
from flowroll.wire.safetensors import LENGTH_BYTES, BlobError, StoredTensor, broken_header, read_header

_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """Identifies one save of a file without reading its data.

    Attributes:
        size: The size of the file in bytes.
        mtime_ns: When the file was last written to, in nanoseconds.
        header_sha256: The sha256 of the safetensors header.
        machine: The name of the machine that looked at the file.
        inode: The inode on that machine; a file that replaces another has another inode.
    """

    size: int
    mtime_ns: int
    header_sha256: str
    machine: str
    inode: int

    def is_same_save(self, other: FileStamp) -> bool:
        """Returns whether both stamps are of the same save. Inodes are compared only if both are of the same machine."""
        if self.machine == other.machine and self.inode != other.inode:
            return False
        return (self.size, self.mtime_ns, self.header_sha256) == (other.size, other.mtime_ns, other.header_sha256)


class TensorFile:
    """An open safetensors file with a valid header and the length that the header implies. It is a context manager.

    Args:
        path: The path of a regular file.

    Attributes:
        path: The path of the file.
        stored: The names, dtypes, shapes and places of its tensors.
        stamp: The stamp of the file when it was opened.

    Raises:
        CheckpointError: It is no regular file, its header is invalid, or its length does not fit the header.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # O_NONBLOCK, because opening a pipe would otherwise wait for its other end forever. It has no effect on a regular file.
        self._file: BinaryIO = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        try:
            status = self._look()
            self.stored, header_sha256 = self._read_header(status.st_size)
            self.stamp = FileStamp(
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
                header_sha256=header_sha256,
                machine=platform.node(),
                inode=status.st_ino,
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
            CheckpointError: The file ends before the tensor is full.
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
        """Refuses a file that was written to since it was opened: the data that was read may be partly old and partly new.

        Raises:
            CheckpointError: The file has changed.
        """
        status = self._look()
        if (status.st_size, status.st_mtime_ns) != (self.stamp.size, self.stamp.mtime_ns):
            raise CheckpointError(f"{self.path} must stay as it is while it is read, got a change; save it, then ask again.")

    def _look(self) -> os.stat_result:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path} must be a regular file, got another kind; give a .safetensors file.")
        return status

    def _read_header(self, size: int) -> tuple[list[StoredTensor], str]:
        length = int.from_bytes(self._file.read(LENGTH_BYTES), "little")
        raw = self._file.read(length) if 0 < length <= min(size - LENGTH_BYTES, _MAX_HEADER) else b""
        try:
            stored = read_header(raw)
        except BlobError as error:
            raise CheckpointError(broken_header(str(self.path), error, "copy the file again")) from error
        end = stored[-1].stop if stored else LENGTH_BYTES + length
        if end != size:
            raise CheckpointError(f"{self.path} must be {end} bytes long, got {size}; the file is truncated, copy it again.")
        return stored, hashlib.sha256(raw).hexdigest()
