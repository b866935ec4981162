"""Rules for functions that move numbers: views, sections, indexing, joining, padding.

None of these functions changes a number. What matters is whether the samples still follow each other along the first dimension.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from flowroll.exact.calls import Args, Decision, Kwargs, argument, each, is_aligned, whole
from flowroll.exact.functions import EXPAND, UNBINDS, VIEW, named
from flowroll.exact.layout import CannotMergeError, address
from flowroll.exact.tracking import Batched, Constant, Own
from flowroll.exact.ways import Sections


def reshape(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles reshapes: numbers keep their order, so the new first dimension must be a multiple of the number of samples."""
    place = trace.place(args[0])
    if not isinstance(place, Batched) or any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values())):
        raise CannotMergeError(f"{named(func)} with these arguments")
    result = func(*args, **kwargs)
    rows, rest = divmod(result.shape[0], trace.samples.count) if result.ndim else (0, 1)
    if rest:
        raise CannotMergeError(f"{named(func)} puts several samples into one row")
    shape = (rows, *result.shape[1:])
    if func in EXPAND:
        alone = place.alone.expand(shape) if result.ndim == args[0].ndim else result
    else:
        alone = place.alone.view(shape) if func in VIEW else place.alone.reshape(shape)
    trace.put_batched(result, alone, place.is_conditioning)
    return result, None


def sections(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles splits: pieces along the first dimension must each lie in one sample; pieces along others are views."""
    place = trace.place(args[0])
    if not isinstance(place, Batched):
        raise CannotMergeError(f"{named(func)} takes the samples' data as numbers")
    has_rows = func in UNBINDS
    at = 1 if has_rows else 2
    if func is not Tensor.__iter__ and argument(args, kwargs, at, "dim", 0) not in (0, -args[0].ndim):
        return whole(trace, func, args, kwargs)
    pieces = list(args[0].unbind(0)) if has_rows else list(func(*args, **kwargs))
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + (1 if has_rows else len(piece)))
    cuts = list(itertools.pairwise(starts))
    kind = iter if func is Tensor.__iter__ else tuple
    return _cut(trace, func, args, kwargs, place, cuts, has_rows, kind)


def index_rows(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles indexing that takes an entry or a piece of one sample, or the same part of all samples."""
    tensor, index = args
    place = trace.place(tensor)
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(place, Batched) or any(
        isinstance(part, Tensor) and isinstance(trace.place(part), Batched) for part in parts
    ):
        return each(trace, func, args, kwargs)
    first, rest = (parts[0], parts[1:]) if parts else (Ellipsis, ())
    length = len(tensor)
    if isinstance(first, int) and not isinstance(first, bool):
        start = first + length if first < 0 else first
        if not 0 <= start < length:
            raise IndexError(first)
        return _cut(trace, func, args, kwargs, place, [(start, start + 1)], True, None, rest)
    if isinstance(first, slice) and first != slice(None):
        start, stop, step = first.indices(length)
        if step == 1 and (start, stop) != (0, length):
            return _cut(trace, func, args, kwargs, place, [(start, stop)], False, None, rest)
        if step != 1:
            raise CannotMergeError("a slice with steps through the samples")
    return whole(trace, func, args, kwargs)


def _cut(
    trace: Any,
    func: Any,
    args: Args,
    kwargs: Kwargs,
    place: Batched,
    cuts: list[tuple[int, int]],
    rows: bool,
    kind: Any,
    rest: Args = (),
) -> Decision:
    """Cuts pieces of single samples, each with the memory layout that it has in the sample's own tensor."""
    if kind is iter:
        raise CannotMergeError("rows are taken one after the other")
    length = len(place.alone)
    pieces = []
    for start, stop in cuts:
        sample = start // length
        if stop > (sample + 1) * length or stop < start or sample >= trace.samples.count:
            raise CannotMergeError("a piece of the batch holds several samples")
        pieces.append((sample, start - sample * length, stop - sample * length))
    at = address(place.alone)
    lie_alike = all(address(part) == at for part in args[0].split(length))
    way = None if lie_alike else Sections(at, tuple(pieces), rows, kind, rest)
    result = func(*args, **kwargs) if way is None else way(trace.samples, func, args, kwargs)
    for one, (sample, _, _) in zip([result] if kind is None else result, pieces, strict=True):
        trace.put(one, Own(trace.token, sample))
    return result, way


def join(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles concatenation: along the first dimension it runs per sample, along others it is one copy."""
    dim = argument(args, kwargs, 1, "dim", 0)
    tensors = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    inside = tensors and dim not in (0, -tensors[0].ndim - (1 if func is torch.stack else 0))
    if inside and is_aligned(trace, args, kwargs):
        return whole(trace, func, args, kwargs)
    return each(trace, func, args, kwargs)


def pad(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles padding: with a constant it is a copy of the whole batch; other modes run per sample."""
    mode = argument(args, kwargs, 2, "mode", "constant")
    return (whole if mode == "constant" else each)(trace, func, args, kwargs)


def empty(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a new tensor that takes nothing but dtype and device from the samples' data."""
    result = func(*args, **kwargs)
    trace.put(result, Constant(trace.token, True, True))
    return result, None
