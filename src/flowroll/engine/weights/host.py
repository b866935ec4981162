"""Where tensors of a GPU are kept in the host's memory: pinned, so that copies run at full speed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# A power of two: torch's allocator of pinned memory rounds up to one (aten/src/ATen/core/CachingHostAllocator.h).
_CHUNK_BYTES = 2**28
_ALIGNED_BYTES = 64


class PinnedMemory:
    """Memory for many tensors that live and end together. Several threads may use it.

    Memory for each tensor alone would be rounded up to a power of two, which takes half as much again for a transformer's
    weights. So tensors are cut from chunks; a chunk ends with the last of its tensors. Without a GPU it is ordinary memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
        """Returns a tensor without values, contiguous unless strides are given.

        Raises:
            RuntimeError: The host has not enough memory.
        """
        if stride is None:
            stride = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        if not can_pin():
            return torch.empty_strided(shape, stride, dtype=dtype)
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        num_bytes = (last + 1) * dtype.itemsize if math.prod(shape) else 0
        return self._cut(num_bytes).view(dtype).as_strided(shape, stride)

    def _cut(self, num_bytes: int) -> Tensor:
        with self._lock:
            start = -(-self._used // _ALIGNED_BYTES) * _ALIGNED_BYTES
            if start + num_bytes > self._chunk.numel():
                self._chunk, start = torch.empty(max(num_bytes, _CHUNK_BYTES), dtype=torch.uint8, pin_memory=True), 0
            self._used = start + num_bytes
            return self._chunk[start : self._used]


def can_pin() -> bool:
    """Tells whether there is a GPU that memory can be pinned for."""
    return torch.cuda.is_available()


def synchronize(tensors: Iterable[Tensor]) -> None:
    """Waits for the copies of these tensors, where any is on a GPU."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
