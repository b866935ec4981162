"""Rules for functions of tensors that are padded, because the texts of the samples differ in length.

What a function may do to a padded batch is known where it computes every row by itself, or moves rows without parting a text's
own rows. Everything else runs per sample, on its own rows; where that is not certain, the samples do not share the forward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.exact import arithmetic, calls, shapes
from flowroll.exact.calls import BROADCASTS, Args, Decision, Kwargs, Rule, argument, is_aligned, numbers_in
from flowroll.exact.functions import (
    CASTS,
    COPIES,
    ELEMENTWISE,
    EXPAND,
    INDEXING,
    JOINS,
    NEW,
    PER_SAMPLE,
    POINTWISE,
    RESHAPES,
    ROW_NORMS,
    ROW_REDUCTIONS,
    SECTIONS,
    UNBINDS,
    VIEW,
    VIEWS,
    functions,
    named,
)
from flowroll.exact.layout import ALLOCATED, CannotMergeError, address
from flowroll.exact.padding import Lengths, Padding, cut, moved
from flowroll.exact.ragged_ways import RaggedAttention, RaggedEach, RaggedProduct
from flowroll.exact.tracking import Batched, tensors_in
from flowroll.exact.ways import Path, put_at


def _batched(trace: Any, args: Sequence[Any], kwargs: Kwargs) -> list[tuple[Tensor, Batched]]:
    places = [(tensor, trace.place(tensor)) for _, tensor in tensors_in(args, kwargs)]
    return [(tensor, place) for tensor, place in places if isinstance(place, Batched)]


def _padding(trace: Any, args: Args, kwargs: Kwargs) -> Padding:
    """Returns where the padded arguments, which must be alike, have their padding."""
    found = {place.padding for _, place in _batched(trace, args, kwargs)} - {None}
    if len(found) != 1:
        raise CannotMergeError("texts are padded in several ways")
    (padding,) = found
    assert padding is not None
    return padding


def _lengths(trace: Any) -> Lengths:
    lengths: Lengths = trace.samples.lengths
    return lengths


def _alone(
    trace: Any, func: Any, args: Args, kwargs: Kwargs
) -> tuple[list[Any], dict[str, Any], tuple[tuple[Path, Padding], ...]]:
    """Returns the first sample's own arguments, and the places of arguments with rows for the text that are no sample's."""
    padding, lengths = _padding(trace, args, kwargs), _lengths(trace)
    alone_args, alone_kwargs, _ = calls.alone_of(trace, func, args, kwargs)
    sizes = {(tensor.ndim, tensor.shape[padding.dim]) for tensor, place in _batched(trace, args, kwargs) if place.padding}
    if len(sizes) != 1:
        raise CannotMergeError(f"{named(func)} takes texts that are padded in several ways")
    ((ndim, size),) = sizes
    constant = []
    for path, tensor in tensors_in(args, kwargs):
        if isinstance(trace.place(tensor), Batched):
            continue
        dim = tensor.ndim - (ndim - padding.dim)
        if func in CASTS:
            continue
        if func in BROADCASTS:
            # Dimensions are matched from the last one on.
            if dim >= 0 and tensor.shape[dim] == size:
                there = Padding(dim, padding.start)
                constant.append((path, there))
                put_at(alone_args, alone_kwargs, path, cut(tensor, there, lengths.own[0], lengths.padded))
        elif {size, lengths.padded} & set(tensor.shape):
            raise CannotMergeError(f"{named(func)} takes a tensor that may have a row for each of the text's")
    return alone_args, alone_kwargs, tuple(constant)


def _put(trace: Any, result: Any, alone: Any, padding: Padding) -> None:
    """Marks a result, or each of several, as padded where the first sample's own has fewer rows."""
    if isinstance(result, (tuple, list)):
        for one, own in zip(result, alone, strict=True):
            _put(trace, one, own, padding)
        return
    if not isinstance(result, Tensor) or not isinstance(alone, Tensor):
        raise CannotMergeError("a function of the samples' data returns no tensor")
    trace.put_batched(result, alone, False, moved(padding, result.shape, alone.shape, _lengths(trace).missing))


def whole(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Makes the plain call on the padded batch."""
    alone_args, alone_kwargs, _ = _alone(trace, func, args, kwargs)
    alone, result = func(*alone_args, **alone_kwargs), func(*args, **kwargs)
    _put(trace, result, alone, _padding(trace, args, kwargs))
    return result, None


def each(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Computes the function of each sample's own rows by itself."""
    padding = _padding(trace, args, kwargs)
    alone_args, alone_kwargs, constant = _alone(trace, func, args, kwargs)
    sizes = {tensor.shape[padding.dim] for tensor, place in _batched(trace, args, kwargs) if place.padding}
    if numbers_in(args, kwargs) & {_lengths(trace).padded, trace.samples.count, *sizes}:
        raise CannotMergeError(f"{named(func)} is given a number that may be the length of the text or of the batch")
    splits: list[tuple[Path, int, Padding | None, bool]] = [(path, 0, there, False) for path, there in constant]
    for path, tensor in tensors_in(args, kwargs):
        place = trace.place(tensor)
        if isinstance(place, Batched):
            if place.padding is not None and address(place.alone):
                raise CannotMergeError(f"{named(func)} takes rows that do not lie where an allocation would put them")
            splits.append((path, address(place.alone), place.padding, True))
    way = RaggedEach(tuple(splits))
    results = way.results(trace.samples, func, args, kwargs)
    alone, last = func(*alone_args, **alone_kwargs), results[-1]
    if alone.shape != last.shape:
        missing = _lengths(trace).own[-1] - _lengths(trace).own[0]
        way = replace(way, padding=moved(padding, last.shape, alone.shape, missing))
    result = way.joined(trace.samples, results)
    trace.put_batched(result, alone, False, way.padding)
    return result, way


def elementwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles functions of one rounded operation per element."""
    if not is_aligned(trace, args[:1] if func in CASTS else args, kwargs):
        return each(trace, func, args, kwargs)
    return (whole if arithmetic.rounds_once(func, args, kwargs) else pointwise)(trace, func, args, kwargs)


def pointwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles functions of several operations per element: every length of text must end between vectors."""
    if not is_aligned(trace, args, kwargs):
        return each(trace, func, args, kwargs)
    alone_args, alone_kwargs, _ = _alone(trace, func, args, kwargs)
    alone, padding = func(*alone_args, **alone_kwargs), _padding(trace, args, kwargs)
    row = alone.numel() // alone.shape[padding.dim]
    others = alone.shape[padding.dim] - _lengths(trace).own[0]
    sizes = [row * (others + length) for length in range(1, _lengths(trace).padded + 1)]
    sizes.append(row * (others + _lengths(trace).padded) * trace.samples.count)
    keeps = arithmetic.keeps_vectors([one for _, one in tensors_in(args, kwargs)], alone, sizes)
    return (whole if keeps else each)(trace, func, args, kwargs)


def power(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles powers, as `arithmetic` does."""
    return (elementwise if arithmetic.is_square(args) else pointwise)(trace, func, args, kwargs)


def inverse_root(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles rsqrt, as `arithmetic` does."""
    return (elementwise if arithmetic.is_wide(args, kwargs) else pointwise)(trace, func, args, kwargs)


def rows(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles reductions and norms along the last dimension, which go row by row unless a row is long and alone."""
    tensor = args[0]
    last = tensor.ndim - 1
    if func in ROW_NORMS:
        others = [trace.place(one) for path, one in tensors_in(args, kwargs) if path != (0,)]
        fits = len(argument(args, kwargs, 1, "normalized_shape", ())) == 1 and not any(others)
    else:
        dim = argument(args, kwargs, 1, "dim", None)
        fits = (dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim) in (-1, last)
    place = trace.place(tensor)
    if not fits or not isinstance(place, Batched) or place.padding is None or place.padding.dim == last:
        return each(trace, func, args, kwargs)
    if tensor.is_complex() or not tensor.is_contiguous() or tensor.shape[-1] >= arithmetic.GRAIN:
        return each(trace, func, args, kwargs)
    return whole(trace, func, args, kwargs)


def reshape(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles reshapes that keep the dimension of the rows."""
    place, padding = trace.place(args[0]), _padding(trace, args, kwargs)
    if not isinstance(place, Batched) or place.padding is None or any(isinstance(one, torch.dtype) for one in args):
        raise CannotMergeError(f"{named(func)} with these arguments")
    result = func(*args, **kwargs)
    size, before = args[0].shape[padding.dim], math.prod(args[0].shape[: padding.dim])
    if func in EXPAND:
        dims = [padding.dim] if result.ndim == args[0].ndim else []
    else:
        dims = [dim for dim, one in enumerate(result.shape) if one == size and math.prod(result.shape[:dim]) == before]
    if len(dims) != 1 or result.shape[0] % trace.samples.count:
        raise CannotMergeError(f"{named(func)} puts rows of a text together with others")
    shape = [result.shape[0] // trace.samples.count, *result.shape[1:]]
    shape[dims[0]] -= _lengths(trace).missing
    if func in EXPAND:
        alone = place.alone.expand(shape)
    else:
        alone = place.alone.view(shape) if func in VIEW else place.alone.reshape(shape)
    trace.put_batched(result, alone, False, Padding(dims[0], padding.start))
    return result, None


def sections(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles splits: along the rows, the pieces must not part a text's own rows."""
    padding = _padding(trace, args, kwargs)
    dim = argument(args, kwargs, 1 if func in UNBINDS else 2, "dim", 0) % args[0].ndim
    if func in UNBINDS or dim == 0:
        raise CannotMergeError(f"{named(func)} takes rows one after the other")
    if dim != padding.dim:
        return whole(trace, func, args, kwargs)
    result = func(*args, **kwargs)
    ends = [0, *itertools.accumulate(piece.shape[dim] for piece in result)]
    for piece, cuts in zip(result, itertools.pairwise(ends), strict=True):
        _put_piece(trace, piece, args[0], cuts)
    return result, None


def index(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles indexing: along the rows, a slice must not part a text's own rows."""
    tensor, given = args
    padding, parts = _padding(trace, args, kwargs), given if isinstance(given, tuple) else (given,)
    plain = [isinstance(part, slice) for part in parts]
    if not plain or not plain[0] or parts[0] != slice(None) or any(isinstance(part, Tensor) for part in parts):
        if Ellipsis in parts and not any(isinstance(part, (Tensor, list)) for part in parts):
            # What stands behind the ellipsis belongs to the last dimensions.
            at = parts.index(Ellipsis)
            if not at and tensor.ndim - len(parts[1:]) > padding.dim and None not in parts:
                return whole(trace, func, args, kwargs)
        raise CannotMergeError(f"{named(func)} takes rows of a text in a way that is not known")
    if len(parts) <= padding.dim or parts[padding.dim] == slice(None):
        return whole(trace, func, args, kwargs)
    if not all(plain) or any(part != slice(None) for at, part in enumerate(parts) if at != padding.dim):
        raise CannotMergeError(f"{named(func)} takes rows of a text in a way that is not known")
    start, stop, step = parts[padding.dim].indices(tensor.shape[padding.dim])
    if step != 1:
        raise CannotMergeError(f"{named(func)} takes every so many rows of a text")
    result = func(*args, **kwargs)
    _put_piece(trace, result, tensor, (start, max(start, stop)))
    return result, None


def _put_piece(trace: Any, piece: Tensor, padded_tensor: Tensor, cuts: tuple[int, int]) -> None:
    """Marks a piece of the rows, from `start` up to `stop`, of a padded tensor."""
    place = trace.place(padded_tensor)
    padding, padded, missing = place.padding, _lengths(trace).padded, _lengths(trace).missing
    front, end = padding.start, padding.start + padded
    if any(front < one < end for one in cuts):
        raise CannotMergeError("a text's own rows are parted")
    start, stop = (one - missing if one >= end else one for one in cuts)
    alone = place.alone.narrow(padding.dim, start, stop - start)
    if cuts[0] >= end and piece.stride(padding.dim) * piece.element_size() % ALLOCATED:
        raise CannotMergeError("rows behind a text lie elsewhere in each sample")
    holds_text = cuts[0] <= front and end <= cuts[1]
    trace.put_batched(piece, alone, False, Padding(padding.dim, front - cuts[0]) if holds_text else None)


def join(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles concatenation: along the rows, beside one text alone."""
    tensors, padding = list(args[0]), _padding(trace, args, kwargs)
    dim = argument(args, kwargs, 1, "dim", 0) % (tensors[0].ndim + (1 if func is torch.stack else 0))
    places = [trace.place(one) for one in tensors]
    if dim == 0 or not all(isinstance(place, Batched) for place in places):
        raise CannotMergeError(f"{named(func)} joins a text and what is no sample's")
    if dim != padding.dim or func is torch.stack:
        return whole(trace, func, args, kwargs)
    texts = [at for at, place in enumerate(places) if place.padding is not None]
    if len(texts) != 1:
        raise CannotMergeError(f"{named(func)} joins several texts")
    result = func(*args, **kwargs)
    alone = func([place.alone for place in places], *args[1:], **kwargs)
    start = padding.start + sum(one.shape[dim] for one in tensors[: texts[0]])
    trace.put_batched(result, alone, False, Padding(dim, start))
    return result, None


def linear(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a linear layer of a text: rows are multiplied together where the kernels were found to allow it."""
    inputs = args[0] if args else None
    place = trace.place(inputs) if isinstance(inputs, Tensor) else None
    others = [trace.place(one) for path, one in tensors_in(args, kwargs) if path != (0,)]
    if not isinstance(place, Batched) or inputs is None or any(isinstance(one, Batched) for one in others):
        return each(trace, func, args, kwargs)
    is_text = inputs.ndim == 3 and place.padding == Padding(1, 0) and inputs.shape[1] == _lengths(trace).padded
    if not is_text or len(place.alone) != 1 or not inputs.is_contiguous() or not place.alone.is_contiguous():
        return each(trace, func, args, kwargs)
    if address(place.alone):
        raise CannotMergeError("rows of a text do not lie where an allocation would put them")
    way = RaggedProduct()
    alone_args, alone_kwargs = list(args), dict(kwargs)
    put_at(alone_args, alone_kwargs, (0,), place.alone)
    result = way(trace.samples, func, args, kwargs)
    trace.put_batched(result, func(*alone_args, **alone_kwargs), False, place.padding)
    return result, way


def attention(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles attention: without a mask or options, of each sample's own rows."""
    operands, is_plain = arithmetic.plain_attention(args, kwargs)
    places = [place for _, place in _batched(trace, operands, {})]
    padding = _padding(trace, args, kwargs)
    if not is_plain or padding.dim != 2 or [place.padding for place in places] != [padding] * 3:
        raise CannotMergeError("texts of several lengths go into attention with a mask or options")
    alone = [place.alone for place in places]
    if not all(_heads_are_inside(one) for one in (*operands, *alone)) or any(address(one) for one in alone):
        raise CannotMergeError("the heads of texts of several lengths do not lie inside the rows")
    way = RaggedAttention(padding.start)
    result = way(trace.samples, func, args, kwargs)
    trace.put_batched(result, func(*alone), False, padding)
    return result, way


def _heads_are_inside(operand: Tensor) -> bool:
    return operand.ndim == 4 and operand.transpose(1, 2).is_contiguous()


def unknown(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a function without a rule."""
    trace.without_rule.add(named(func))
    return each(trace, func, args, kwargs)


# Views whose numbers among the arguments are places in a dimension, not dimensions.
_PLACES = functions("narrow", "select", "diagonal")

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(PER_SAMPLE, each),
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(ELEMENTWISE | COPIES, elementwise),
    **dict.fromkeys(ROW_REDUCTIONS | ROW_NORMS, rows),
    **dict.fromkeys(VIEWS - _PLACES, whole),
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(SECTIONS, sections),
    **dict.fromkeys(INDEXING, index),
    **dict.fromkeys(JOINS, join),
    **dict.fromkeys(NEW, shapes.empty),
    **dict.fromkeys(functions("pow"), power),
    **dict.fromkeys(functions("rsqrt"), inverse_root),
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
}
