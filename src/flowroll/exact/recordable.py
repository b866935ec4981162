"""Which calls of a forward can be written down in a program: those that cannot depend on the numbers in tensors.

A program calls the same functions with the same plain arguments for other numbers. So neither a shape nor a plain value that
the model's code reads may follow from numbers. Nothing is taken on trust: what is not known is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowroll.exact.calls import has_tensor
from flowroll.exact.functions import (
    COPIES,
    ELEMENTWISE,
    FACTORIES,
    GATHERS,
    METADATA,
    NEW,
    POINTWISE,
    WRITES,
    functions,
    named,
)
from flowroll.exact.mode import Getter
from flowroll.exact.rules import RULES
from flowroll.exact.tracking import all_tensors
from flowroll.parallel.mesh import gather_parts

# What tells nothing of a tensor but what the shapes, strides and dtypes of the arguments decide.
_SHAPES = METADATA - functions("data_ptr", "__hash__", "requires_grad_", "storage_offset")
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "is_cpu", "is_cuda", "is_meta"})
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
# The shape of what these return follows from the shapes of their arguments, but for the exceptions in `_reads_numbers`.
_KNOWN = (frozenset(RULES) | FACTORIES | NEW | GATHERS | WRITES | {gather_parts}) - METADATA
_CHOOSING, _WHERE = functions("__getitem__"), functions("where")
# What is as long as the numbers of any tensor say; of the second, the first argument is the data.
_SIZED = functions("zeros", "ones", "full", "empty", "arange", "eye")
_COUNTED = functions("repeat_interleave", "tensor_split")
# Of these no tensor can be taken for a size, beside those that `_reads_numbers` knows.
_UNSIZED = (
    ELEMENTWISE | POINTWISE | COPIES | GATHERS | WRITES | functions("embedding", "index_select", "gather") | _CHOOSING | _WHERE
)


def computes_nothing(func: Any, result: Any) -> bool:
    """Tells whether a call only reads what the shapes, strides and dtypes of the forward's arguments decide."""
    return _attribute_of(func) in _ATTRIBUTES or (func in _SHAPES and not has_tensor(result))


def fault_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> str | None:
    """Says why a call that computes something cannot be written down; None if it can."""
    attribute = _attribute_of(func)
    if attribute is not None or func in _SHAPES:
        return None if attribute in _VIEWS else f"{attribute or named(func)} may differ in the next forward"
    if func not in _KNOWN or _reads_numbers(func, args, kwargs):
        return f"{named(func)} may read numbers"
    return None if result is None or has_tensor(result) else f"{named(func)} returns no tensor"


def holds_tensor(value: Any) -> bool:
    """Tells whether tensors lie in a value that is none itself."""
    return not isinstance(value, Tensor) and any(True for _ in all_tensors(value))


def _attribute_of(func: Any) -> str | None:
    """Returns the name of the attribute of a tensor that is read; None for the call of a function."""
    return func.__self__.__name__ if type(func) is Getter else None


def _reads_numbers(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tells whether the shape of a known function's result may depend on the numbers in its arguments."""
    if func in _CHOOSING:
        index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        bounds = [bound for one in index if isinstance(one, slice) for bound in (one.start, one.stop, one.step)]
        masks = [one for one in index if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)]
        return bool(masks) or any(isinstance(bound, Tensor) for bound in bounds) or any(map(holds_tensor, index))
    if func in _WHERE:
        return len(args) + len(kwargs) == 1
    if func in _UNSIZED:
        return False
    options = list(all_tensors((*(args if func in _SIZED else args[1:]), *kwargs.values())))
    # An integer is a size to torch also where it is a tensor.
    return any(func in _SIZED | _COUNTED or (one.numel() == 1 and not one.is_floating_point()) for one in options)
