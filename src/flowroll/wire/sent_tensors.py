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
from dataclasses import dataclass
from typing import Any

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
# torch's CUDA_IPC_REF_COUNTER_FILE_SIZE: so many counters of eight bytes a segment has. One of them is lowered, unchecked.
_IPC_COUNTERS = 10_000
# "c": of cudaMalloc. The other kind, of an expandable segment, names a process whose file descriptors would be taken.
_IPC_PREFIX = re.compile(rb"[\x01\x02]c", re.DOTALL)


class SharedStorage:
    """A segment of torch's. It is read and not mapped: one that its owner cuts short is then an error.

    It is open while it is checked and while it is read, not between: a bucket may have more of them than a process may open.

    Args:
        name: Of the segment, e.g. b"/torch_29626_1983863381_3".
        nbytes: Of its data.

    Raises:
        ValueError: No such name; no regular file of this user; or a smaller one.
    """

    def __init__(self, name: bytes, nbytes: int) -> None:
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
            if (
                not stat.S_ISREG(status.st_mode)
                or status.st_uid != os.geteuid()
                or status.st_size < _COUNTER_BYTES + self.nbytes
            ):
                raise ValueError("the segment must be this user's, and as long as is said")
            yield descriptor
        finally:
            os.close(descriptor)

    def read_into(self, target: Tensor, start: int) -> None:
        """Fills a contiguous tensor on the CPU with the data from a byte on.

        Raises:
            ValueError: The segment is gone, is another's, or was cut short.
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
        """Tells the owner that one user less has it, as torch's receiver does; else it would never be freed. Once."""
        if self._is_released:
            return
        self._is_released = True
        # It may be gone already.
        with contextlib.suppress(RuntimeError):
            # No manager is named, so torch uses this process's own; the name was checked, and so was the size.
            torch.UntypedStorage._new_shared_filename_cpu(b"", self._name, self.nbytes)._shared_decref()


@dataclass(frozen=True, slots=True)
class SentStorage:
    """A storage as elements of one dtype; None: one without data."""

    source: SharedStorage | None
    dtype: torch.dtype

    def typed(self, dtype: object) -> SentStorage:
        """The same bytes in another dtype."""
        return SentStorage(self.source, _dtype(dtype))

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return 0 if self.source is None else self.source.nbytes


@dataclass(frozen=True, slots=True)
class SentTensor:
    """A tensor whose data is elsewhere.

    Attributes:
        source: A shared storage, from which it is read; or a tensor on a GPU, whose memory is another process's.
        start: In bytes from the beginning of the storage.
        shape: Its shape.
        stride: In elements.
        dtype: Its dtype.
    """

    source: SharedStorage | Tensor | None
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where its data is."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    def copy_to(self, target: Tensor) -> None:
        """Fills a contiguous tensor of this shape and dtype.

        Raises:
            ValueError: The segment was cut short.
        """
        if self.numel == 0 or self.source is None:
            return
        if isinstance(self.source, Tensor):
            data = self.source.view(torch.uint8)[self.start : self.start + _span(self.shape, self.stride) * self.dtype.itemsize]
            # A copy puts bytes that begin between two elements where elements may be.
            flat = data.clone().view(self.dtype)
            target.copy_(flat.as_strided(self.shape, self.stride))
        elif self.stride == _contiguous(self.shape):
            self.source.read_into(target, self.start)
        else:
            span = torch.empty(_span(self.shape, self.stride), dtype=self.dtype)
            self.source.read_into(span, self.start)
            target.copy_(span.as_strided(self.shape, self.stride))

    def part(self, first: object, end: object, shape: object, dtype: object) -> SentTensor:
        """Elements of a flat tensor, seen as another.

        Raises:
            ValueError: They are not all of this tensor's, or not as many bytes as the other has.
        """
        numbers, size = _numbers((first, end)), _numbers(shape)
        kind = _dtype(dtype)
        if len(self.shape) != 1 or self.stride != (1,) or not numbers[0] <= numbers[1] <= self.shape[0]:
            raise ValueError("a part must lie in its flat tensor")
        if (numbers[1] - numbers[0]) * self.dtype.itemsize != math.prod(size) * kind.itemsize:
            raise ValueError("a part must have as many bytes as its shape says")
        return SentTensor(self.source, self.start + numbers[0] * self.dtype.itemsize, size, _contiguous(size), kind)


def shared_storage(name: object, size: object, dtype: object) -> SentStorage:
    """The storage that a sender has put into a segment of this name; `size` elements."""
    kind = _dtype(dtype)
    if not isinstance(name, bytes):
        raise TypeError("a segment's name must be bytes")
    (count,) = _numbers((size,))
    return SentStorage(SharedStorage(name, count * kind.itemsize), kind)


def empty_storage() -> SentStorage:
    """A storage without data."""
    return SentStorage(None, torch.uint8)


def rebuilt_tensor(storage: object, offset: object, size: object, stride: object) -> SentTensor:
    """A tensor in a storage, in which all of it has to lie."""
    if not isinstance(storage, SentStorage):
        raise TypeError("a tensor must lie in a storage")
    shape, strides, (first,) = _numbers(size), _numbers(stride), _numbers((offset,))
    _check_inside(shape, strides, first, storage.nbytes // storage.dtype.itemsize)
    return SentTensor(storage.source, first * storage.dtype.itemsize, shape, strides, storage.dtype)


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
    """A tensor in memory that another process has on a GPU; the arguments are those of torch's own function for it."""
    shape, strides, kind = _numbers(size), _numbers(stride), _dtype(dtype)
    first, nbytes, place, count_place = _numbers((offset, storage_bytes, storage_offset, counter_offset))
    _check_inside(shape, strides, first, nbytes // kind.itemsize)
    if nbytes == 0:
        return SentTensor(None, 0, shape, strides, kind)
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
    return SentTensor(whole, first * kind.itemsize, shape, strides, kind)


def _cuda_device(device: object) -> int:
    """The index of a GPU that is given by its index or by its UUID."""
    for index in range(torch.cuda.device_count()):
        if (type(device) is int and device == index) or (
            type(device) is str and device == str(torch.cuda.get_device_properties(index).uuid)
        ):
            return index
    raise ValueError("the GPU must be one of this machine's")


def _numbers(values: object) -> tuple[int, ...]:
    """Natural numbers of a size that cannot overflow anything."""
    if type(values) is not tuple or len(values) > _MAX_DIMS:
        raise TypeError("a shape must be a short tuple")
    if not all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in values):
        raise ValueError("a size must be a natural number, and no huge one")
    return values


def _dtype(dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a dtype must be one")
    return dtype


def _check_inside(shape: Sequence[int], stride: Sequence[int], first: int, room: int) -> None:
    if len(shape) != len(stride):
        raise ValueError("a tensor must have a stride for each dimension")
    if math.prod(shape) > _MAX_NUMBER:
        raise ValueError("a tensor must not be huge")
    if math.prod(shape) and first + _span(shape, stride) > room:
        raise ValueError("a tensor must lie in its storage")


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
