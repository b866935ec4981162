"""The memory of one rank's weights, given back while nobody generates.

Both ways have two halves, so that several ranks do them together or not at all: the first copies and can fail, the second
exchanges the parameters' data and cannot. Parameters stay the objects that they are; what comes back lies as it lay, in its
strides and its address modulo 64, on which the bits of products depend. Weights are never read from the checkpoint again: they
may have been updated since.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from flowroll.errors import AsleepError, EngineError
from flowroll.types.tensors import plain_tensor, tensor_bytes

SleepMode: TypeAlias = Literal["offload", "disk"]
# Where torch's allocator puts every tensor.
_ALLOCATED = 64
# A parameter, and what makes its data again.
_Kept: TypeAlias = tuple[Tensor, Callable[[], Tensor]]


class WeightOffload:
    """Whether one rank's weights are in memory, and where they are if not.

    Args:
        parameters: All that may be released; some may come twice.

    Attributes:
        mode: How the memory was released; None: the weights are there.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters
        self._kept: list[_Kept] = []
        self.mode: SleepMode | None = None

    def check_awake(self) -> None:
        """Refuses to work without weights.

        Raises:
            AsleepError: Their memory is released.
        """
        if self.mode is not None:
            raise AsleepError("the engine must be awake to use its weights, got released memory; wake it first.")

    def prepare_release(self, mode: SleepMode) -> Callable[[], int]:
        """Copies the weights to where they are kept; what is returned releases their memory, and tells how many bytes.

        Args:
            mode: "offload": in pinned memory of the host; weights of a CPU are there already, and nothing is released. "disk":
                in a file of this process's own without a name, in the folder for temporary files (TMPDIR).

        Raises:
            EngineError: There is no room there. Everything is as it was.
        """
        parameters = list({id(parameter): parameter for parameter in self._parameters()}.values())
        try:
            if mode == "disk":
                spill = _Spill()
                kept = [spill.keep(parameter) for parameter in parameters]
            else:
                kept = [_in_host_memory(parameter) for parameter in parameters if parameter.device.type == "cuda"]
                _synchronize(parameters)
        except (OSError, MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
            raise _failed("weights must find room to be kept in", error) from error

        def release() -> int:
            num_bytes = sum(parameter.nbytes for parameter, _ in kept)
            for parameter, _ in kept:
                parameter.data = parameter.data.new_empty(0)
            self._kept, self.mode = kept, mode
            if any(parameter.device.type == "cuda" for parameter in parameters):
                torch.cuda.empty_cache()
            return num_bytes

        return release

    def prepare_resume(self) -> Callable[[], int]:
        """Makes the weights again; what is returned puts them in place, and tells how many bytes.

        Raises:
            EngineError: There is no room for them, or the disk fails. They stay where they are kept.
        """
        try:
            restored = [(parameter, load()) for parameter, load in self._kept]
            _synchronize([data for _, data in restored])
        except (OSError, MemoryError, RuntimeError) as error:
            raise _failed("weights must come back", error) from error

        def resume() -> int:
            for parameter, data in restored:
                parameter.data = data
            self._kept, self.mode = [], None
            return sum(data.nbytes for _, data in restored)

        return resume

    def forget(self) -> None:
        """Lets go of what is kept; nothing comes back after that."""
        self._kept = []
        self._parameters = tuple


def _in_host_memory(parameter: Tensor) -> _Kept:
    data = parameter.data
    kept = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, pin_memory=True)
    kept.copy_(data, non_blocking=True)
    device = data.device
    return parameter, lambda: kept.to(device, non_blocking=True)


class _Spill:
    """A file without a name, closed with the last that holds it, and gone with the process."""

    def __init__(self) -> None:
        self._file: Any = tempfile.TemporaryFile(prefix="flowroll-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def keep(self, parameter: Tensor) -> _Kept:
        """Appends a parameter's data."""
        data, start = parameter.data, self._file.tell()
        shape, dtype, device = data.shape, data.dtype, data.device
        layout = data.stride(), data.data_ptr() % _ALLOCATED
        self._file.write(tensor_bytes(plain_tensor(data)))
        # Now, and not with what is written last: a full disk is to be found before anything is released.
        self._file.flush()

        def load() -> Tensor:
            stored = torch.empty(shape, dtype=dtype)
            view = tensor_bytes(stored)
            self._file.seek(start)
            if self._file.readinto(view) != len(view):
                raise OSError("the file of the kept weights ended before its end")
            return _empty(shape, *layout, dtype, device).copy_(stored)

        return parameter, load


def _empty(shape: torch.Size, stride: tuple[int, ...], offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that lies as said; on a GPU as it is allocated."""
    if offset == 0 or device.type == "cuda":
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = torch.empty((last + 1) * dtype.itemsize + _ALLOCATED, dtype=torch.uint8)
    start = (offset - memory.data_ptr()) % _ALLOCATED
    return memory[start : start + (last + 1) * dtype.itemsize].view(dtype).as_strided(shape, stride)


def _synchronize(tensors: Iterable[Tensor]) -> None:
    if any(tensor.device.type == "cuda" for tensor in tensors):
        torch.cuda.synchronize()


def _failed(rule: str, error: Exception) -> EngineError:
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return EngineError(f"the {rule}, got {type(error).__name__}: {reason}; make room, then ask again.")
