"""Releases the memory of one rank's weights while no request runs, and restores it.

Release and resume have two halves each, so that either all ranks do them or none: the first half copies and can fail; the
second exchanges the parameters' data and cannot fail. Parameters stay the same objects. Restored data has the strides and
the address modulo 64 that it had before, because the bits of matrix products depend on them. Weights are never read from the
checkpoint again, because they may have been updated since.

In the mode "discard" the weights that an update replaces are not kept. After waking they are memory without values, and the
engine counts as asleep until an update has brought every one of them.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from flowroll.engine.weights.host import PinnedMemory, synchronize
from flowroll.errors import AsleepError, EngineError, WeightsRejectedError
from flowroll.types.tensors import plain_tensor, tensor_bytes

SleepMode: TypeAlias = Literal["offload", "disk", "discard"]
# torch's allocator aligns every tensor to this number of bytes.
_ALLOCATED = 64
# A parameter, and a function that restores its data.
_Kept: TypeAlias = tuple[Tensor, Callable[[], Tensor]]


class WeightOffload:
    """Knows whether one rank's weights are in memory, and holds them while they are not.

    Args:
        parameters: Returns all parameters and buffers that may be released; each may occur several times.
        discardable: Returns those that an update of the transformer replaces.

    Attributes:
        mode: How the memory was released; None while the weights are in memory.
        is_released: Whether the memory is released. After waking from "discard" it is there, without weights.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]], discardable: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters, self._discardable = parameters, discardable
        self._kept: list[_Kept] = []
        self.mode: SleepMode | None = None
        self.is_released = False

    def check_awake(self) -> None:
        """Checks that the weights are in memory.

        Raises:
            AsleepError: The memory of the weights is released, or they were discarded and no update has brought them back.
        """
        self.check_memory()
        if self.mode is not None:
            raise AsleepError(
                "the engine must have weights to use them, got none since it slept in the mode discard; send a complete update "
                "of the transformer."
            )

    def check_memory(self) -> None:
        """Checks that there is memory that new weights can be put in.

        Raises:
            AsleepError: The memory of the weights is released.
        """
        if self.is_released:
            raise AsleepError("the engine must be awake to use its weights, got released memory; wake it first.")

    def check_brings_all(self, replaced: Iterable[Tensor]) -> None:
        """Checks that the weights which an update replaces are all that were discarded, if any were.

        Raises:
            WeightsRejectedError: Some of the transformer's weights would stay without values.
        """
        missing = {id(one) for one in self._discardable()} - {id(one) for one in replaced}
        if self.mode == "discard" and missing:
            raise WeightsRejectedError(
                f"new weights must be all of the transformer's after a sleep in the mode discard, got none for {len(missing)} "
                "tensors; begin an update that is not partial."
            )

    def note_weights(self) -> None:
        """Notes that every weight has a value again: `check_brings_all` was asked, and all ranks have the weights."""
        self.mode = None

    def prepare_release(self, mode: SleepMode) -> Callable[[], int]:
        """Copies the weights to where they are kept. The returned function releases their memory, and returns its bytes.

        Args:
            mode: "offload": pinned memory of the host; weights on a CPU are in host memory already, so nothing is released.
                "disk": an unnamed file of this process in the folder for temporary files (TMPDIR). "discard": nowhere, for the
                weights that an update of the transformer replaces; the others as with "offload".

        Raises:
            EngineError: There is not enough room there. Nothing has changed.
        """
        # What was discarded before is still without values.
        mode = self.mode or mode
        discarded = {id(one): one for one in self._discardable()} if mode == "discard" else {}
        parameters = list({id(parameter): parameter for parameter in self._parameters()}.values())
        others = [parameter for parameter in parameters if id(parameter) not in discarded]
        try:
            if mode == "disk":
                spill = _Spill()
                kept = [spill.keep(parameter) for parameter in others]
            else:
                memory = PinnedMemory()
                kept = [_in_host_memory(parameter, memory) for parameter in others if parameter.device.type == "cuda"]
                synchronize(parameters)
            kept += [(one, _without_values(one)) for one in discarded.values()]
        except (OSError, MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
            raise _failed("weights must find room to be kept in", error) from error

        def release() -> int:
            num_bytes = sum(parameter.nbytes for parameter, _ in kept)
            for parameter, _ in kept:
                parameter.data = parameter.data.new_empty(0)
            self._kept, self.mode, self.is_released = kept, mode, True
            if any(parameter.device.type == "cuda" for parameter in parameters):
                torch.cuda.empty_cache()
            return num_bytes

        return release

    def prepare_resume(self) -> Callable[[], int]:
        """Loads the kept weights. The returned function puts them in place and returns the number of bytes.

        Raises:
            EngineError: There is not enough memory for the weights, or the disk fails. The kept weights stay where they are.
        """
        try:
            restored = [(parameter, load()) for parameter, load in self._kept]
            synchronize(data for _, data in restored)
        except (OSError, MemoryError, RuntimeError) as error:
            raise _failed("weights must come back", error) from error

        def resume() -> int:
            for parameter, data in restored:
                parameter.data = data
            self._kept, self.is_released = [], False
            self.mode = "discard" if self.mode == "discard" else None
            return sum(data.nbytes for _, data in restored)

        return resume

    def forget(self) -> None:
        """Drops the kept weights and all parameters; no weights can be restored after that."""
        self._kept = []
        self._parameters = self._discardable = tuple


def _in_host_memory(parameter: Tensor, memory: PinnedMemory) -> _Kept:
    data = parameter.data
    kept = memory.empty(data.shape, data.dtype, data.stride())
    kept.copy_(data, non_blocking=True)
    device = data.device
    return parameter, lambda: kept.to(device, non_blocking=True)


def _without_values(parameter: Tensor) -> Callable[[], Tensor]:
    """Returns a function that allocates a tensor as this one is, full of NaN: a number that nobody has sent must show."""
    data = parameter.data
    layout = data.shape, data.stride(), data.data_ptr() % _ALLOCATED, data.dtype, data.device
    value = torch.nan if data.is_floating_point() else 0
    return lambda: _empty(*layout).fill_(value)


class _Spill:
    """An unnamed temporary file. It is closed when the last reference to this object is dropped, or the process ends."""

    def __init__(self) -> None:
        self._file: Any = tempfile.TemporaryFile(prefix="flowroll-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def keep(self, parameter: Tensor) -> _Kept:
        """Appends a parameter's data to the file; returns the parameter and a function that reads the data again."""
        data, start = parameter.data, self._file.tell()
        shape, dtype, device = data.shape, data.dtype, data.device
        layout = data.stride(), data.data_ptr() % _ALLOCATED
        self._file.write(tensor_bytes(plain_tensor(data)))
        # Flushed for each parameter, so that a full disk is found before any memory is released.
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
    """Allocates a tensor with these strides, at an address that is `offset` modulo 64; on a GPU at any allocated address."""
    if offset == 0 or device.type == "cuda":
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = torch.empty((last + 1) * dtype.itemsize + _ALLOCATED, dtype=torch.uint8)
    start = (offset - memory.data_ptr()) % _ALLOCATED
    return memory[start : start + (last + 1) * dtype.itemsize].view(dtype).as_strided(shape, stride)


def _failed(rule: str, error: Exception) -> EngineError:
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return EngineError(f"the {rule}, got {type(error).__name__}: {reason}; make room, then ask again.")
