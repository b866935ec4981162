"""Memory that two processes have in common: a file without a name, which is gone when neither of them holds it any more."""

from __future__ import annotations

import errno
import math
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# Where torch's allocator puts every tensor; what lies at another address may give other bits.
_ALIGNMENT = 64


class SharedMemory:
    """Some bytes in a file without a name. Whoever has its descriptor can map the same bytes.

    The memory is freed when the last process that maps it, or holds its descriptor, lets go of it or ends, in whatever way.

    Args:
        descriptor: The descriptor of the file; owned by this object from now on.

    Attributes:
        bytes: The memory, as a tensor [bytes] of uint8.

    Raises:
        OSError: It cannot be mapped. The descriptor is closed then, too.
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
        """Makes memory of this size, filled with zeros.

        Raises:
            OSError: There is no room for it.
        """
        descriptor = os.memfd_create("flowroll", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, max(num_bytes, 1))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)


def tensor_at(memory: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes begin at this place of some memory."""
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


def placed(num_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Places for tensors of these sizes one after the other, and the size of all: each begins at a multiple of 64."""
    starts, end = [], 0
    for size in num_bytes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end
