"""What each function of a model may do in a forward that several samples share.

A rule is written down for a function only where it is known that the plain call on the whole batch has every sample's bits, or
which way has them. A function without a rule is computed for each sample by itself. Where even that is not certain (results
without a first dimension, writes into the samples' data, random draws) the samples do not share the forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.exact.functions import (
    CASTS,
    COPIES,
    ELEMENTWISE,
    EXPAND,
    FACTORIES,
    GATHERS,
    INDEXING,
    JOINS,
    METADATA,
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
    WRITES,
    functions,
    named,
)
from flowroll.exact.layout import CannotMergeError, address, is_outermost, outline
from flowroll.exact.probe import attention_is_independent
from flowroll.exact.tracking import Batched, Constant, Own, Place, tensors_in
from flowroll.exact.ways import Each, Path, Product, Sections, Way, put_at

Args: TypeAlias = "tuple[Any, ...]"
Kwargs: TypeAlias = Mapping[str, Any]
Decision: TypeAlias = "tuple[Any, Way | None]"
Rule: TypeAlias = Callable[["Any", Any, Args, Kwargs], Decision]

# torch divides element-wise work, and reductions, among threads in parts of at least this many elements.
GRAIN = 32768
# Elements between which element-wise kernels may pass from one thread or kind of code to another: two vectors of 64 bytes, in
# the smallest dtype that we run.
_VECTORS = 64


def decide(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """The result of a call in the forward that is analysed, and how it is to be computed.

    Args:
        trace: The analysis; its places are updated.
        func: A function of torch, as a function mode is given it.
        args: The positional arguments of the call.
        kwargs: The named arguments of the call.

    Raises:
        CannotMergeError: No way is known to have every sample's bits.
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
        return RULES.get(func, _unknown)(trace, func, args, kwargs)
    if len(owners) == 1:
        result = func(*args, **kwargs)
        if not _has_tensor(result):
            raise CannotMergeError(f"{named(func)} reads a sample's data")
        trace.put(result, next(place for place in places if isinstance(place, Own)), args)
        return result, None
    return _gather(trace, func, args, kwargs)


def _constant(trace: Any, func: Any, args: Args, kwargs: Kwargs, found: list[Tensor], places: list[Place | None]) -> Decision:
    """A function of weights, tables and positions alone."""
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
    """Entries of all samples, in their order, become a batch."""
    entries = args[0] if args else None
    dim = _argument(args, kwargs, 1, "dim", 0)
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


def _whole(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """The plain call, for functions that move numbers or look at one row at a time."""
    alone_args, alone_kwargs, _ = _alone(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    result = func(*args, **kwargs)
    trace.put_batched(result, alone, _is_conditioning(trace, args, kwargs))
    return result, None


def _elementwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """One rounded operation per element: the same bits wherever the element stands."""
    if not _is_aligned(trace, args[:1] if func in CASTS else args, kwargs):
        return _each(trace, func, args, kwargs)
    if "alpha" in kwargs or "rounding_mode" in kwargs or (_any_complex(args, kwargs) and func not in COPIES):
        return _pointwise(trace, func, args, kwargs)
    return _whole(trace, func, args, kwargs)


def _pointwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Several operations per element: the last elements of a tensor, and of each thread's part, have other bits."""
    if not _is_aligned(trace, args, kwargs):
        return _each(trace, func, args, kwargs)
    alone_args, alone_kwargs, _ = _alone(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    own, full = alone.numel(), [tensor for _, tensor in tensors_in(args, kwargs) if tensor.ndim == alone.ndim]
    in_rows = all(tensor.is_contiguous() for tensor in full) or alone.shape[-1] % _VECTORS == 0
    on_cpu = alone.device.type == "cpu"
    if on_cpu and not (in_rows and _in_whole_vectors(own) and _in_whole_vectors(own * trace.samples.count)):
        return _each(trace, func, args, kwargs)
    return _whole(trace, func, args, kwargs)


def _power(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """A square is one product."""
    is_square = len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 2
    return (_elementwise if is_square else _pointwise)(trace, func, args, kwargs)


def _inverse_root(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Two rounded operations, between which bfloat16 is rounded or not, depending on the place of the element."""
    is_wide = all(tensor.dtype in (torch.float32, torch.float64) for _, tensor in tensors_in(args, kwargs))
    return (_elementwise if is_wide else _pointwise)(trace, func, args, kwargs)


def _reduce_rows(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """A reduction along the last dimension goes row by row, unless a sample alone has a single, long row."""
    tensor = args[0]
    dim = _argument(args, kwargs, 1, "dim", None)
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    alone = trace.place(tensor).alone if isinstance(trace.place(tensor), Batched) else None
    if alone is None or dim not in (-1, tensor.ndim - 1) or tensor.ndim < 2 or not tensor.is_contiguous():
        return _each(trace, func, args, kwargs)
    if tensor.is_complex() or (alone.numel() == alone.shape[-1] and alone.numel() >= GRAIN):
        return _each(trace, func, args, kwargs)
    return _whole(trace, func, args, kwargs)


def _normalize_rows(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """A norm of trailing dimensions goes row by row."""
    tensor, shape = args[0], _argument(args, kwargs, 1, "normalized_shape", ())
    others = [one for path, one in tensors_in(args, kwargs) if path != (0,)]
    shared = all(trace.place(one) is None for one in others)
    alone = trace.place(tensor)
    if not isinstance(alone, Batched) or not shared or len(shape) != 1 or tensor.ndim < 2 or not tensor.is_contiguous():
        return _each(trace, func, args, kwargs)
    if alone.alone.numel() == alone.alone.shape[-1] and alone.alone.numel() >= GRAIN:
        return _each(trace, func, args, kwargs)
    return _whole(trace, func, args, kwargs)


def _linear(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """A product of the rows that each sample has alone."""
    inputs = args[0] if args else None
    place = trace.place(inputs) if isinstance(inputs, Tensor) else None
    others = [trace.place(one) for path, one in tensors_in(args, kwargs) if path != (0,)]
    if not isinstance(place, Batched) or any(isinstance(one, Batched) for one in others):
        return _each(trace, func, args, kwargs)
    if not place.alone.is_contiguous() or address(place.alone) or inputs is None or inputs.ndim < 2:
        return _each(trace, func, args, kwargs)
    alone_args, alone_kwargs, _ = _alone(trace, func, args, kwargs)
    way = Product(place.is_conditioning)
    result = way(trace.samples, func, args, kwargs)
    trace.put_batched(result, func(*alone_args, **alone_kwargs), place.is_conditioning)
    return result, way


def _attention(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """The whole batch at once where that is known to change nothing: plain attention, without a mask."""
    given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
    operands = [given.pop(name, None) for name in ("query", "key", "value")]
    # What a call says beyond the three operands, and what it means by default.
    is_plain = all(value == _ATTENTION[name] for name, value in given.items() if name != "attn_mask")
    places = [trace.place(one) for one in operands if isinstance(one, Tensor)]
    aligned = [isinstance(place, Batched) and address(place.alone) == 0 for place in places]
    if is_plain and given.get("attn_mask") is None and len(aligned) == 3 and all(aligned):
        query, key, value = operands
        if attention_is_independent(query, key, value, trace.samples.count):
            return _whole(trace, func, args, kwargs)
    return _each(trace, func, args, kwargs)


def _reshape(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Numbers keep their order, so samples stay behind each other where the new first dimension divides among them."""
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


def _sections(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Pieces along another dimension are views; along the first each is of one sample."""
    place = trace.place(args[0])
    if not isinstance(place, Batched):
        raise CannotMergeError(f"{named(func)} takes the samples' data as numbers")
    has_rows = func in UNBINDS
    at = 1 if has_rows else 2
    if func is not Tensor.__iter__ and _argument(args, kwargs, at, "dim", 0) not in (0, -args[0].ndim):
        return _whole(trace, func, args, kwargs)
    pieces = list(args[0].unbind(0)) if has_rows else list(func(*args, **kwargs))
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + (1 if has_rows else len(piece)))
    cuts = list(itertools.pairwise(starts))
    kind = iter if func is Tensor.__iter__ else tuple
    return _cut(trace, func, args, kwargs, place, cuts, has_rows, kind)


def _index(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """An entry or a piece of one sample, or the same part of all."""
    tensor, index = args
    place = trace.place(tensor)
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(place, Batched) or any(
        isinstance(part, Tensor) and isinstance(trace.place(part), Batched) for part in parts
    ):
        return _each(trace, func, args, kwargs)
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
    return _whole(trace, func, args, kwargs)


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
    """Pieces of single samples, lying as they do in the sample's own tensor."""
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


def _joined_along(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Tensors side by side are copied; one behind the other they are joined for each sample."""
    dim = _argument(args, kwargs, 1, "dim", 0)
    tensors = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    inside = tensors and dim not in (0, -tensors[0].ndim - (1 if func is torch.stack else 0))
    if inside and _is_aligned(trace, args, kwargs):
        return _whole(trace, func, args, kwargs)
    return _each(trace, func, args, kwargs)


def _pad(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Padding with a number is a copy."""
    mode = _argument(args, kwargs, 2, "mode", "constant")
    return (_whole if mode == "constant" else _each)(trace, func, args, kwargs)


def _empty(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """A new tensor of some shape takes nothing but dtype and device from the samples' data."""
    result = func(*args, **kwargs)
    trace.put(result, Constant(trace.token, True, True))
    return result, None


def _unknown(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """A function without a rule: each sample's, unless a number among the arguments may be the length of the batch."""
    numbers = {
        number
        for value in (*args, *kwargs.values())
        for number in (value if isinstance(value, (list, tuple, torch.Size)) else (value,))
        if type(number) is int and number > 1
    }
    lengths = {len(tensor) for _, tensor in tensors_in(args, kwargs) if isinstance(trace.place(tensor), Batched)}
    if numbers & lengths:
        raise CannotMergeError(f"{named(func)} is given a number that may be the length of the batch")
    trace.without_rule.add(named(func))
    return _each(trace, func, args, kwargs)


def _each(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """The function of each sample by itself."""
    alone_args, alone_kwargs, splits = _alone(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    if not _has_tensor(alone):
        raise CannotMergeError(f"{named(func)} reads the samples' data")
    way = Each(splits, outline(alone))
    result = way(trace.samples, func, args, kwargs)
    trace.put_batched(result, alone, _is_conditioning(trace, args, kwargs))
    return result, way


def _alone(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> tuple[list[Any], dict[str, Any], tuple[tuple[Path, int], ...]]:
    """The first sample's own arguments, and which of the batch's arguments have a part per sample."""
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


def _is_aligned(trace: Any, args: Args, kwargs: Kwargs) -> bool:
    """Whether every batched tensor has the samples along the first dimension of the result, and no other is as long there."""
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


def _is_conditioning(trace: Any, args: Args, kwargs: Kwargs) -> bool:
    places = [trace.place(tensor) for _, tensor in tensors_in(args, kwargs)]
    return all(place.is_conditioning for place in places if isinstance(place, Batched))


def _writes(func: Any, kwargs: Kwargs) -> bool:
    name = named(func)
    is_in_place = name.endswith("_") and not name.startswith("__")
    return is_in_place or name in _AUGMENTED or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _any_complex(args: Args, kwargs: Kwargs) -> bool:
    return any(tensor.is_complex() for _, tensor in tensors_in(args, kwargs))


def _has_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, (tuple, list)) and any(map(_has_tensor, result)))


def _argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _in_whole_vectors(numel: int) -> bool:
    """Whether every thread's part of so many elements ends between vectors."""
    threads = torch.get_num_threads()
    # Most kernels give a thread no less than the grain; gelu uses all threads from half of it on.
    counts = {threads, max(1, min(threads, -(-numel // GRAIN)))}
    return numel % _VECTORS == 0 and all(-(-numel // count) % _VECTORS == 0 for count in counts)


_AUGMENTED = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
) | {"__setitem__"}

_ATTENTION: Mapping[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}

BROADCASTS = ELEMENTWISE | POINTWISE | COPIES

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(PER_SAMPLE, _each),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(ELEMENTWISE | COPIES, _elementwise),
    **dict.fromkeys(ROW_REDUCTIONS, _reduce_rows),
    **dict.fromkeys(ROW_NORMS, _normalize_rows),
    **dict.fromkeys(VIEWS, _whole),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(SECTIONS, _sections),
    **dict.fromkeys(INDEXING, _index),
    **dict.fromkeys(JOINS, _joined_along),
    **dict.fromkeys(NEW, _empty),
    **dict.fromkeys(functions("pow"), _power),
    **dict.fromkeys(functions("rsqrt"), _inverse_root),
    F.pad: _pad,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
