"""Recordings on a CPU that keep to the rules of a CUDA graph: the same kernels, on the memory that they had, without Python."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flowroll.exact.layout import laid_out_like, without_repeats


class _Slot(int):
    """The number of a tensor on a tape."""


class Tape(TorchDispatchMode):
    """The operations of one call of a function. What the function did not make is read where it lay, whatever lies there."""

    def __init__(self, function: Callable[[], list[Tensor]], spoil: bool, note_replay: Callable[[], None]) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._slots: dict[int, _Slot] = {}
        self._memory: dict[int, Tensor] = {}
        # Every tensor of the call, so that no two have the same id.
        self._alive: list[Tensor] = []
        with self:
            outputs = function()
        self._results = [self._slots[id(one)] for one in outputs]
        self.outputs = [laid_out_like(one) for one in outputs]
        self.num_bytes = sum(one.nbytes for one in self._alive)
        self._alive.clear()
        self._spoil, self._note_replay = spoil, note_replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_map_only(Tensor, self._read, (args, kwargs))
        result = func(*args, **kwargs)
        self._calls.append((func, *given, tree_map_only(Tensor, self._write, result)))
        return result

    def _read(self, tensor: Tensor) -> _Slot:
        if id(tensor) not in self._slots:
            slot = self._write(tensor)
            # This memory, and not what the tensor may be given in its place.
            self._memory[slot] = tensor.detach()
        return self._slots[id(tensor)]

    def _write(self, tensor: Tensor) -> _Slot:
        self._alive.append(tensor)
        return self._slots.setdefault(id(tensor), _Slot(len(self._slots)))

    def replay(self) -> None:
        self._note_replay()
        values = dict(self._memory)
        with torch.no_grad():
            for func, args, kwargs, slots in self._calls:
                args, kwargs = tree_map_only(_Slot, values.__getitem__, (args, kwargs))
                result = func(*args, **kwargs)
                for slot, tensor in zip(_flat(slots, _Slot), _flat(result, Tensor), strict=True):
                    values[slot] = tensor
            for output, slot in zip(self.outputs, self._results, strict=True):
                without_repeats(output).copy_(without_repeats(values[slot]))
            if self._spoil:
                self.outputs[0].view(-1)[0].add_(1e-3)


def _flat(value: Any, kind: type) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [item for one in value for item in _flat(one, kind)]
    return [value] if isinstance(value, kind) else []


class TapeRecorder:
    """Records on a CPU. `spoil` makes recordings that have other bits, `fails` none.

    `faults` says what a CUDA graph would not bear: a replay that does not wait for the one before it, and a recording that is
    dropped while a replay may be under way.
    """

    def __init__(self) -> None:
        self.spoil = self.fails = False
        self.num_recorded = 0
        self.faults: list[str] = []
        self._has_waited = self._is_under_way = False

    def record(self, function: Callable[[], list[Tensor]]) -> Tape:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.num_recorded += 1
        tape = Tape(function, self.spoil, self._note_replay)
        weakref.finalize(tape, self._note_drop)
        return tape

    def before_replay(self) -> None:
        self._has_waited = True

    def before_drop(self) -> None:
        self._is_under_way = False

    def _note_replay(self) -> None:
        if not self._has_waited:
            self.faults.append("a replay did not wait for the one before it")
        self._has_waited, self._is_under_way = False, True

    def _note_drop(self) -> None:
        if self._is_under_way:
            self.faults.append("a recording was dropped while a replay may have been under way")
