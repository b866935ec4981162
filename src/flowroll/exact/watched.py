"""Watches one forward, and tells whether it may be recorded, and what it reads beside its arguments.

A recording runs the same kernels on the same addresses again, without the Python code between them. So a forward may be
recorded only if that code decides nothing by numbers in tensors, and whatever lies at those addresses has to stay there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowroll.exact.tracking import all_tensors

_SELECTIONS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class ForwardWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the operations of one forward.

    Attributes:
        reason: Why the forward may not be recorded, after the first operation of that kind; None: it may be.
        outside: The tensors that the forward read and did not make: arguments, weights, tables of the model's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason: str | None = None
        self.outside: list[Tensor] = []
        # The storages of the tensors outside, and the forward's own views of these, which take no memory.
        self._outer: set[int] = set()
        self._known: dict[int, Tensor] = {}
        # The storages of the forward's own tensors, as long as these live.
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and notes what it reads and makes."""
        kwargs = kwargs or {}
        given = list(all_tensors((args, kwargs)))
        for tensor in given:
            if id(tensor) not in self._known and (key := _storage(tensor)) not in self._made:
                self._outer.add(key)
                self._known[id(tensor)] = tensor
                self.outside.append(tensor)
        result = func(*args, **kwargs)
        made = list(all_tensors(result))
        self.reason = self.reason or self._fault(func, args, kwargs, given, made)
        for tensor in made:
            if (key := _storage(tensor)) in self._outer:
                self._known[id(tensor)] = tensor
            elif key not in self._made:
                self._made.add(key)
                weakref.finalize(tensor.untyped_storage(), self._made.discard, key)
        return result

    def _fault(self, func: Any, args: Any, kwargs: Mapping[str, Any], given: list[Tensor], made: list[Tensor]) -> str | None:
        """Says what an operation does that no recording can repeat; None if there is nothing."""
        name = func._schema.name
        if name in _SELECTIONS:
            if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in all_tensors(args[1])):
                return f"{name} selects by a mask"
        elif any(tag in func.tags for tag in _DATA_DEPENDENT):
            return f"{name} lets the host read a tensor"
        if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs):
            return f"{name} draws random numbers"
        if len({tensor.device for tensor in (*given, *made)}) > 1:
            return f"{name} has tensors on two devices"
        if any(_storage(tensor) not in self._made for tensor in _written(func, args, kwargs)):
            return f"{name} writes into a tensor that the forward did not make"
        return None


def _drops_nothing(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tells whether an operation is an attention without dropout, which draws nothing."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(value == 0)
    return False


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from all_tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Anchors:
    """The tensors that a recording reads beside its arguments. It must not be replayed once one of them lies elsewhere.

    Tensors of the model are the model's to keep. Others, as an entry of a cache of tables, are kept here, because whoever made
    them may forget them, and the recording goes on reading that memory.

    Args:
        outside: What the forward read and did not make, without its arguments.
        owned: The model's own parameters and buffers.
    """

    def __init__(self, outside: Iterable[Tensor], owned: Iterable[Tensor]) -> None:
        owned_ids = {id(tensor) for tensor in owned}
        outside = list(outside)
        self._kept = [tensor for tensor in outside if id(tensor) not in owned_ids]
        self._addresses = [(weakref.ref(tensor), tensor.data_ptr()) for tensor in outside]

    def hold(self) -> bool:
        """Tells whether all of them are where they were. It takes about 0.1 microseconds for each."""
        for reference, address in self._addresses:
            tensor = reference()
            if tensor is None or tensor.data_ptr() != address:
                return False
        return True
