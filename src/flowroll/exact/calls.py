"""Computes a call for all samples at once, or for each sample by itself, in the forward that is being analyzed.

The rules in `arithmetic` and `shapes` choose between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowroll.exact.functions import COPIES, ELEMENTWISE, INDEXING, POINTWISE, VIEWS, named
from flowroll.exact.layout import CannotMergeError, address, is_outermost, layout_of
from flowroll.exact.tracking import Batched, Constant, tensors_in
from flowroll.exact.ways import Each, Path, Way, put_at

Args: TypeAlias = "tuple[Any, ...]"
Kwargs: TypeAlias = Mapping[str, Any]
Decision: TypeAlias = "tuple[Any, Way | None]"
Rule: TypeAlias = Callable[["Any", Any, Args, Kwargs], Decision]

BROADCASTS = ELEMENTWISE | POINTWISE | COPIES


def whole(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Makes the plain call on the whole batch, for functions that move numbers or compute one row at a time."""
    alone_args, alone_kwargs, _ = alone_of(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    result = func(*args, **kwargs)
    trace.put_batched(result, alone, is_conditioning(trace, args, kwargs))
    return result, None


def each(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Computes the function of each sample by itself."""
    alone_args, alone_kwargs, splits = alone_of(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    if not has_tensor(alone):
        raise CannotMergeError(f"{named(func)} reads the samples' data")
    of_conditioning = is_conditioning(trace, args, kwargs)
    way = Each(splits, layout_of(alone), of_conditioning)
    result = way(trace.samples, func, args, kwargs)
    trace.put_batched(result, alone, of_conditioning)
    return result, way


def alone_of(
    trace: Any, func: Any, args: Args, kwargs: Kwargs
) -> tuple[list[Any], dict[str, Any], tuple[tuple[Path, int], ...]]:
    """Returns the first sample's own arguments, and the places of the arguments that have a part per sample."""
    alone_args, alone_kwargs = list(args), dict(kwargs)
    found = list(tensors_in(args, kwargs))
    batched = [(tensor.ndim, len(tensor)) for _, tensor in found if isinstance(trace.place(tensor), Batched)]
    splits = []
    for path, tensor in found:
        place = trace.place(tensor)
        if isinstance(place, Batched):
            own = place.alone
        elif isinstance(place, Constant) and tensor.ndim and (tensor.ndim, len(tensor)) in batched and len(tensor) > 1:
            if not place.is_exact or not is_outermost(tensor):
                raise CannotMergeError(f"{named(func)} takes a batched tensor that is not known exactly")
            own = tensor[: len(tensor) // trace.samples.count]
        elif isinstance(place, Constant) and tensor.ndim and len(tensor) in {length for _, length in batched if length > 1}:
            # Element by element, dimensions are matched from the last one on: with fewer of them, none is the samples'.
            is_broadcast = func in BROADCASTS and tensor.ndim < min(ndim for ndim, _ in batched)
            if func not in VIEWS and func not in INDEXING and not is_broadcast:
                raise CannotMergeError(f"{named(func)} takes a tensor that may be batched")
            continue
        else:
            continue
        put_at(alone_args, alone_kwargs, path, own)
        splits.append((path, address(own) if isinstance(place, Batched) else 0))
    return alone_args, alone_kwargs, tuple(splits)


def is_aligned(trace: Any, args: Args, kwargs: Kwargs) -> bool:
    """Tells whether all batched tensors have the samples along the first dimension of the result, and no other is as long."""
    found = [tensor for _, tensor in tensors_in(args, kwargs)]
    ndim = max(tensor.ndim for tensor in found)
    lengths = set()
    for tensor in found:
        place = trace.place(tensor)
        if isinstance(place, Batched):
            if tensor.ndim != ndim:
                return False
            lengths.add(len(tensor))
        elif tensor.ndim == ndim and len(tensor) != 1:
            if not isinstance(place, Constant):
                return False
            lengths.add(len(tensor))
    return len(lengths) == 1


def is_conditioning(trace: Any, args: Args, kwargs: Kwargs) -> bool:
    """Tells whether every batched argument has one number per entry, as timesteps have."""
    places = [trace.place(tensor) for _, tensor in tensors_in(args, kwargs)]
    return all(place.is_conditioning for place in places if isinstance(place, Batched))


def has_tensor(result: Any) -> bool:
    """Tells whether a result is a tensor, or holds one."""
    return isinstance(result, Tensor) or (isinstance(result, (tuple, list)) and any(map(has_tensor, result)))


def any_complex(args: Args, kwargs: Kwargs) -> bool:
    """Tells whether an argument holds complex numbers."""
    return any(tensor.is_complex() for _, tensor in tensors_in(args, kwargs))


def numbers_in(args: Args, kwargs: Kwargs) -> set[int]:
    """Returns the whole numbers above 1 among the arguments, and in lists among them."""
    return {
        number
        for value in (*args, *kwargs.values())
        for number in (value if isinstance(value, (list, tuple, torch.Size)) else (value,))
        if type(number) is int and number > 1
    }


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any) -> Any:
    """Returns an argument of a call by its position or its name."""
    return args[position] if len(args) > position else kwargs.get(name, default)
