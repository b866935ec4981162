"""Tensors that another process of this machine holds ready: in a shared-memory segment of torch's, or on a GPU.

Every argument comes from somebody else and is checked here, before anything is opened.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowroll.types.tensors import tensor_bytes

# What torch calls its segments, to the last character.
_SEGMENT = re.compile(rb"/(torch_[0-9]{1,10}_[0-9]{1,10}_[0-9]{1,10})", re.ASCII)
_FOLDER = "/dev/shm"
# Before the data of a segment torch keeps the number of its users.
_COUNTER_BYTES = 64
_MAX_DIMS, _MAX_NUMBER = 16, 2**48
_IPC_HANDLE_BYTES = 64
# torch's CUDA_IPC_REF_COUNTER_FILE_SIZE: a segment has so many counters of eight bytes. One of them is lowered, unchecked.
_IPC_COUNTERS = 10_000
# "c": of cudaMalloc. The other kind, of an expandable segment, names a process whose file descriptors would be taken.
_IPC_PREFIX = re.compile(rb"[\x01\x02]c", re.DOTALL)


class SharedStorage:
    """A segment of torch's. It is read and not mapped, so that one that its owner cuts short is an error and not a crash.

    It is open while it is checked and while it is read, not between: a bucket may have more of them than a process may open.

    Args:
        name: The name of the segment, e.g. b"/torch_29626_1983863381_3".
        nbytes: The bytes of its data.

    Raises:
        TypeError: The name is not bytes.
        ValueError: The name is not one of torch's, or there is no regular file of this user that is as long as is said.
    """

    def __init__(self, name: object, nbytes: int) -> None:
        if not isinstance(name, bytes):
            raise TypeError("a segment's name must be bytes")
        match = _SEGMENT.fullmatch(name)
        if match is None:
            raise ValueError("a segment must be one of torch's")
        self._is_released = False
        self.nbytes, self._name, self._path = nbytes, name, os.path.join(_FOLDER, match[1].decode())
        with self._open():
            pass

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise ValueError("the segment must be there, and readable") from error
        try:
            status = os.fstat(descriptor)
            is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if not is_own or status.st_size < _COUNTER_BYTES + self.nbytes:
                raise ValueError("the segment must be this user's, and as long as is said")
            yield descriptor
        finally:
            os.close(descriptor)

    def read_into(self, target: Tensor, start: int) -> None:
        """Fills a contiguous tensor on the CPU with the data from a byte on.

        Raises:
            ValueError: The segment is gone, belongs to another user, or was cut short.
        """
        view = tensor_bytes(target)
        done = 0
        with self._open() as descriptor:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], _COUNTER_BYTES + start + done)
                if not count:
                    raise ValueError("the segment must stay while it is read")
                done += count

    def release(self) -> None:
        """Tells the owner that one user less has it, as torch's receiver does; otherwise it would never be freed. Once."""
        if self._is_released:
            return
        self._is_released = True
        # It may be gone already.
        with contextlib.suppress(RuntimeError):
            # No manager is named, so torch uses this process's own; the name was checked, and so was the size.
            torch.UntypedStorage._new_shared_filename_cpu(b"", self._name, self.nbytes)._shared_decref()


class SentTensor(NamedTuple):
    """A tensor whose data is elsewhere. A named tuple, since a pickle can change no attribute of it.

    Attributes:
        source: A segment, from which it is read; a tensor of bytes on a GPU, whose memory is another process's; or None if it
            has no data.
        start: The start in bytes from the beginning of the source.
        shape: Its shape.
        stride: The strides in elements.
        dtype: Its dtype.
    """

    source: SharedStorage | Tensor | None
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where its data is."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    def as_dtype(self, dtype: object) -> SentTensor:
        """Returns the same bytes of a flat tensor as elements of another dtype."""
        kind = checked_dtype(dtype)
        self._check_flat()
        return self._replace(shape=(self.shape[0] * self.dtype.itemsize // kind.itemsize,), dtype=kind)

    def view(self, first: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> SentTensor:
        """Elements of a flat tensor from the first on, seen as another tensor.

        Raises:
            ValueError: They do not all lie in this one.
        """
        self._check_flat()
        if len(shape) != len(stride):
            raise ValueError("a tensor must have a stride for each dimension")
        if math.prod(shape) > _MAX_NUMBER:
            raise ValueError("a tensor must not be huge")
        if math.prod(shape) and first + _span(shape, stride) > self.shape[0]:
            raise ValueError("a tensor must lie in its storage")
        return self._replace(start=self.start + first * self.dtype.itemsize, shape=shape, stride=stride)

    def part(self, first: int, end: int, shape: tuple[int, ...], dtype: object) -> SentTensor:
        """Elements of a flat tensor, whose bytes are those of another tensor. They may begin at any byte.

        Raises:
            ValueError: They do not lie in this one, or are not as many bytes as the other tensor has.
        """
        kind = checked_dtype(dtype)
        self._check_flat()
        if not first <= end <= self.shape[0]:
            raise ValueError("a part must lie in its flat tensor")
        if (end - first) * self.dtype.itemsize != math.prod(shape) * kind.itemsize:
            raise ValueError("a part must have as many bytes as its shape says")
        return SentTensor(self.source, self.start + first * self.dtype.itemsize, shape, _contiguous(shape), kind)

    def copy_to(self, target: Tensor) -> None:
        """Fills a contiguous tensor of this shape and dtype.

        Raises:
            ValueError: The segment was cut short.
        """
        if math.prod(self.shape) == 0 or self.source is None:
            return
        if isinstance(self.source, SharedStorage) and self.stride == _contiguous(self.shape):
            self.source.read_into(target, self.start)
            return
        count = _span(self.shape, self.stride)
        if isinstance(self.source, SharedStorage):
            flat = torch.empty(count, dtype=self.dtype)
            self.source.read_into(flat, self.start)
        else:
            # The copy is aligned, whatever byte the data begins at.
            flat = self.source[self.start : self.start + count * self.dtype.itemsize].clone().view(self.dtype)
        target.copy_(flat.as_strided(self.shape, self.stride))

    def _check_flat(self) -> None:
        if len(self.shape) != 1 or self.stride != (1,):
            raise ValueError("a part must lie in a flat tensor")


def empty_storage() -> SentTensor:
    """Returns a storage without data."""
    return SentTensor(None, 0, (0,), (1,), torch.uint8)


def shared_storage(name: object, size: object, dtype: object = torch.uint8) -> SentTensor:
    """Returns the storage that a sender has put into a segment of this name; `size` elements."""
    kind, (count,) = checked_dtype(dtype), checked_numbers((size,))
    return SentTensor(SharedStorage(name, count * kind.itemsize), 0, (count,), (1,), kind)


def cuda_tensor(
    size: object,
    stride: object,
    offset: object,
    dtype: object,
    device: object,
    handle: object,
    storage_bytes: object,
    storage_offset: object,
    requires_grad: object,
    counter_name: object,
    counter_offset: object,
    event_handle: object,
    event_sync_required: object,
) -> SentTensor:
    """Returns a tensor in memory that another process has on a GPU; the arguments are those of torch's own function for it."""
    shape, strides, kind = checked_numbers(size), checked_numbers(stride), checked_dtype(dtype)
    first, nbytes, place, count_place = checked_numbers((offset, storage_bytes, storage_offset, counter_offset))
    found = SentTensor(None, 0, (nbytes // kind.itemsize,), (1,), kind).view(first, shape, strides)
    if nbytes == 0:
        return found
    if not (isinstance(handle, bytes) and isinstance(event_handle, bytes) and isinstance(counter_name, bytes)):
        raise TypeError("handles must be bytes")
    prefix = handle[:-_IPC_HANDLE_BYTES]
    if len(handle) < _IPC_HANDLE_BYTES or (prefix and _IPC_PREFIX.fullmatch(prefix) is None):
        raise ValueError("a handle must be of cudaMalloc; switch expandable segments off")
    if len(event_handle) not in (0, _IPC_HANDLE_BYTES) or _SEGMENT.fullmatch(counter_name) is None:
        raise ValueError("an event's handle must be CUDA's, and the counter's segment torch's")
    if count_place >= _IPC_COUNTERS:
        raise ValueError("a counter must lie in its segment")
    index = _cuda_device(device)
    SharedStorage(counter_name, _IPC_COUNTERS * 8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    # All of the storage, as bytes: which of them the tensor has was checked above.
    whole = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        *(Tensor, torch.Size([nbytes]), (1,), 0, torch.storage.TypedStorage, torch.uint8, index, handle),
        *(nbytes, place, False, counter_name, count_place, event_handle, event_sync_required is True),
    )
    return found._replace(source=whole)


def gpu_uuid(index: int) -> str:
    """Returns the UUID of a GPU of this machine, as torch writes it."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _cuda_device(device: object) -> int:
    """Returns the index of a GPU that is given by its index or by its UUID."""
    for index in range(torch.cuda.device_count()):
        if (type(device) is int and device == index) or (type(device) is str and device == gpu_uuid(index)):
            return index
    raise ValueError("the GPU must be one of this machine's")


def checked_numbers(values: object) -> tuple[int, ...]:
    """Returns a short tuple of natural numbers of a size that cannot overflow anything."""
    if type(values) is not tuple or len(values) > _MAX_DIMS:
        raise TypeError("a shape must be a short tuple")
    if not all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in values):
        raise ValueError("a size must be a natural number, and no huge one")
    return values


def checked_dtype(dtype: Any) -> torch.dtype:
    """Returns what has to be a dtype."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a dtype must be one")
    return dtype


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
