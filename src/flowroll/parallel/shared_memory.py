"""Memory that two processes share: an unnamed file, which is freed when neither process refers to it."""

from __future__ import annotations

import errno
import math
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# torch's allocator aligns every tensor to this number of bytes; another alignment may give other bits.
_ALIGNMENT = 64


class SharedMemory:
    """Bytes in an unnamed file. Every process that has its descriptor can map the same bytes.

    The memory is freed when the last process that maps it or holds its descriptor releases it or ends, in whatever way.

    Args:
        descriptor: The descriptor of the file, which this object owns from now on.

    Attributes:
        descriptor: The descriptor of the file.
        bytes: The memory, as a tensor [bytes] of uint8.

    Raises:
        OSError: The file cannot be mapped. The descriptor is closed in this case too.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        size = os.fstat(descriptor).st_size
        # torch opens the file once more, and closes it: a mapping that is still in use holds no descriptor.
        try:
            self.bytes: Tensor = torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(errno.ENOMEM, str(error)) from None

    @classmethod
    def create(cls, num_bytes: int) -> SharedMemory:
        """Creates memory of this size, at least one byte, filled with zeros.

        Raises:
            OSError: There is not enough memory.
        """
        descriptor = os.memfd_create("flowroll", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, max(num_bytes, 1))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)


def tensor_at(memory: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the tensor whose bytes begin at `start` in `memory`, as a view."""
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


def placed(num_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Returns where tensors of these sizes begin one after the other, each at a multiple of 64, and their size together."""
    starts, end = [], 0
    for size in num_bytes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end
