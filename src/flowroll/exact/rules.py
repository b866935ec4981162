"""Says what each function of a model may do in a forward that several samples share.

A rule is written down for a function only where it is known that the plain call on the whole batch has every sample's bits, or
which way has them. A function without a rule is computed for each sample by itself. Where even that is not certain (results
without a first dimension, writes into the samples' data, random draws) the samples do not share the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.exact import arithmetic, ragged, shapes
from flowroll.exact.calls import Args, Decision, Kwargs, Rule, argument, each, has_tensor, numbers_in, whole
from flowroll.exact.functions import (
    CASTS,
    CONVOLUTIONS,
    COPIES,
    ELEMENTWISE,
    FACTORIES,
    GATHERS,
    GROUP_NORM,
    INDEXING,
    INTERPOLATE,
    JOINS,
    METADATA,
    NEW,
    NORMALIZE,
    PER_SAMPLE,
    POINTWISE,
    RESHAPES,
    ROW_NORMS,
    ROW_REDUCTIONS,
    SECTIONS,
    VIEWS,
    WRITES,
    functions,
    named,
)
from flowroll.exact.layout import CannotMergeError
from flowroll.exact.tracking import Batched, Constant, Own, Place, tensors_in


def decide(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Computes a call in the forward that is analyzed, and decides how it is to be computed from now on.

    Args:
        trace: The analysis, whose places are updated.
        func: A function of torch, as a function mode is given it.
        args: The positional arguments of the call.
        kwargs: The named arguments of the call.

    Raises:
        CannotMergeError: No way is known that gives every sample its own bits.
    """
    if func in METADATA:
        return func(*args, **kwargs), None
    found = [tensor for _, tensor in tensors_in(args[:1] if func in CASTS else args, kwargs)]
    places = [trace.place(tensor) for tensor in found]
    owners = {place.sample for place in places if isinstance(place, Own)}
    is_batched = any(isinstance(place, Batched) for place in places)
    if not owners and not is_batched:
        return _constant(trace, func, args, kwargs, found, places)
    if _writes(func, kwargs):
        raise CannotMergeError(f"{named(func)} writes into the samples' data")
    if is_batched:
        if owners:
            raise CannotMergeError(f"{named(func)} takes a batch and a sample of it")
        if any(isinstance(place, Batched) and place.padding is not None for place in places):
            return ragged.RULES.get(func, ragged.unknown)(trace, func, args, kwargs)
        return RULES.get(func, _unknown)(trace, func, args, kwargs)
    if len(owners) == 1:
        result = func(*args, **kwargs)
        if not has_tensor(result):
            raise CannotMergeError(f"{named(func)} reads a sample's data")
        trace.put(result, next(place for place in places if isinstance(place, Own)), args)
        return result, None
    return _gather(trace, func, args, kwargs)


def _constant(trace: Any, func: Any, args: Args, kwargs: Kwargs, found: list[Tensor], places: list[Place | None]) -> Decision:
    """Handles a function whose arguments are only weights, tables and positions."""
    constants = [place for place in places if isinstance(place, Constant)]
    are_exact = all(place.is_exact for place in constants)
    if _writes(func, kwargs):
        target = places[0] if found and found[0] is (args[0] if args else None) else None
        if func not in WRITES or not isinstance(target, Constant) or not target.is_fresh or not are_exact:
            raise CannotMergeError(f"{named(func)} writes into what outlives the forward, or what is not known exactly")
        return func(*args, **kwargs), None
    result = func(*args, **kwargs)
    is_view = func in VIEWS or func in RESHAPES or func in SECTIONS
    copies = is_view or func in COPIES or func in FACTORIES or func in ELEMENTWISE or func in INDEXING or func in NEW
    is_fresh = (
        all(place.is_fresh for place in constants) and len(constants) == len(places)
        if is_view or func in INDEXING
        else func in FACTORIES
    )
    trace.put(result, Constant(trace.token, copies and are_exact, is_fresh), found)
    return result, None


def _gather(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a function that makes a batch from entries of all samples, in their order."""
    entries = args[0] if args else None
    dim = argument(args, kwargs, 1, "dim", 0)
    if func not in GATHERS or not isinstance(entries, (list, tuple)) or (func in (torch.cat, torch.stack) and dim != 0):
        raise CannotMergeError(f"{named(func)} takes several samples")
    rows, rest = divmod(len(entries), trace.samples.count)
    for index, entry in enumerate(entries):
        place = trace.place(entry)
        first = entries[index % rows] if rows else entry
        if rest or not isinstance(place, Own) or place.sample != index // rows or entry.shape != first.shape:
            raise CannotMergeError(f"{named(func)} does not take all samples alike")
    alone = func(type(entries)(entries[:rows]), *args[1:], **kwargs)
    result = func(*args, **kwargs)
    trace.put_batched(result, alone, False)
    return result, None


def _unknown(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a function without a rule: it runs per sample, unless a number argument may be the length of the batch."""
    lengths = {len(tensor) for _, tensor in tensors_in(args, kwargs) if isinstance(trace.place(tensor), Batched)}
    if numbers_in(args, kwargs) & lengths:
        raise CannotMergeError(f"{named(func)} is given a number that may be the length of the batch")
    trace.without_rule.add(named(func))
    return each(trace, func, args, kwargs)


def _writes(func: Any, kwargs: Kwargs) -> bool:
    name = named(func)
    is_in_place = name.endswith("_") and not name.startswith("__")
    return is_in_place or name in _AUGMENTED or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


_AUGMENTED = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
) | {"__setitem__"}

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(PER_SAMPLE, each),
    **dict.fromkeys(POINTWISE, arithmetic.pointwise),
    **dict.fromkeys(ELEMENTWISE | COPIES, arithmetic.elementwise),
    **dict.fromkeys(ROW_REDUCTIONS, arithmetic.reduce_rows),
    **dict.fromkeys(ROW_NORMS, arithmetic.normalize_rows),
    **dict.fromkeys(VIEWS, whole),
    **dict.fromkeys(RESHAPES, shapes.reshape),
    **dict.fromkeys(SECTIONS, shapes.sections),
    **dict.fromkeys(INDEXING, shapes.index_rows),
    **dict.fromkeys(JOINS, shapes.join),
    **dict.fromkeys(NEW, shapes.empty),
    **dict.fromkeys(functions("pow"), arithmetic.power),
    **dict.fromkeys(functions("rsqrt"), arithmetic.inverse_root),
    **dict.fromkeys(CONVOLUTIONS, arithmetic.convolution),
    **dict.fromkeys(GROUP_NORM, arithmetic.group_norm),
    **dict.fromkeys(NORMALIZE, arithmetic.normalize),
    **dict.fromkeys(INTERPOLATE, arithmetic.interpolate),
    F.pad: shapes.pad,
    F.linear: arithmetic.linear,
    F.scaled_dot_product_attention: arithmetic.attention,
}
