"""Rules for functions that compute numbers: element-wise functions, reductions of rows, products, attention.

Their bits depend on the kernels, which differ with the place of an element and the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowroll.exact.calls import Args, Decision, Kwargs, alone_of, argument, each, is_aligned, whole
from flowroll.exact.functions import CASTS, COPIES, SUMS
from flowroll.exact.layout import address
from flowroll.exact.probe import attention_is_independent, rows_are_independent
from flowroll.exact.tracking import Batched, tensors_in
from flowroll.exact.ways import Product

# torch divides element-wise work, and reductions, among threads in parts of at least this many elements.
GRAIN = 32768
# Elements between which element-wise kernels may pass from one thread or kind of code to another: two vectors of 64 bytes, in
# the smallest dtype that we run.
_VECTORS = 64

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


def elementwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles functions of one rounded operation per element, which have the same bits wherever the element stands."""
    if not is_aligned(trace, args[:1] if func in CASTS else args, kwargs):
        return each(trace, func, args, kwargs)
    if "alpha" in kwargs or "rounding_mode" in kwargs or (_any_complex(args, kwargs) and func not in COPIES):
        return pointwise(trace, func, args, kwargs)
    return whole(trace, func, args, kwargs)


def pointwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles functions of several operations per element, whose bits differ at the end of a tensor or of a thread's part."""
    if not is_aligned(trace, args, kwargs):
        return each(trace, func, args, kwargs)
    alone_args, alone_kwargs, _ = alone_of(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    own, full = alone.numel(), [tensor for _, tensor in tensors_in(args, kwargs) if tensor.ndim == alone.ndim]
    in_rows = all(tensor.is_contiguous() for tensor in full) or alone.shape[-1] % _VECTORS == 0
    on_cpu = alone.device.type == "cpu"
    if on_cpu and not (in_rows and _in_whole_vectors(own) and _in_whole_vectors(own * trace.samples.count)):
        return each(trace, func, args, kwargs)
    return whole(trace, func, args, kwargs)


def power(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles powers: a square is one product per element, and other exponents are several operations."""
    is_square = len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 2
    return (elementwise if is_square else pointwise)(trace, func, args, kwargs)


def inverse_root(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles rsqrt: two rounded operations, between which bfloat16 is rounded or not, depending on the element's place."""
    is_wide = all(tensor.dtype in (torch.float32, torch.float64) for _, tensor in tensors_in(args, kwargs))
    return (elementwise if is_wide else pointwise)(trace, func, args, kwargs)


def reduce_rows(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles reductions along the last dimension: they go row by row, unless a sample alone has a single, long row.

    Some kernels sum a row in another order when there are few rows: of sums and means the probe tells.
    """
    tensor = args[0]
    dim = argument(args, kwargs, 1, "dim", None)
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    alone = trace.place(tensor).alone if isinstance(trace.place(tensor), Batched) else None
    if alone is None or dim not in (-1, tensor.ndim - 1) or tensor.ndim < 2 or not tensor.is_contiguous():
        return each(trace, func, args, kwargs)
    if tensor.is_complex() or (alone.numel() == alone.shape[-1] and alone.numel() >= GRAIN):
        return each(trace, func, args, kwargs)
    if func in SUMS and not rows_are_independent(tensor, trace.samples.count):
        return each(trace, func, args, kwargs)
    return whole(trace, func, args, kwargs)


def normalize_rows(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles norms over trailing dimensions, which go row by row."""
    tensor, shape = args[0], argument(args, kwargs, 1, "normalized_shape", ())
    others = [one for path, one in tensors_in(args, kwargs) if path != (0,)]
    shared = all(trace.place(one) is None for one in others)
    alone = trace.place(tensor)
    if not isinstance(alone, Batched) or not shared or len(shape) != 1 or tensor.ndim < 2 or not tensor.is_contiguous():
        return each(trace, func, args, kwargs)
    if alone.alone.numel() == alone.alone.shape[-1] and alone.alone.numel() >= GRAIN:
        return each(trace, func, args, kwargs)
    return whole(trace, func, args, kwargs)


def linear(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a linear layer: the probe tells whether the rows of all samples may be multiplied together."""
    inputs = args[0] if args else None
    place = trace.place(inputs) if isinstance(inputs, Tensor) else None
    others = [trace.place(one) for path, one in tensors_in(args, kwargs) if path != (0,)]
    if not isinstance(place, Batched) or any(isinstance(one, Batched) for one in others):
        return each(trace, func, args, kwargs)
    if not place.alone.is_contiguous() or address(place.alone) or inputs is None or inputs.ndim < 2:
        return each(trace, func, args, kwargs)
    alone_args, alone_kwargs, _ = alone_of(trace, func, args, kwargs)
    way = Product(place.is_conditioning)
    result = way(trace.samples, func, args, kwargs)
    trace.put_batched(result, func(*alone_args, **alone_kwargs), place.is_conditioning)
    return result, way


def attention(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles attention: plain attention without a mask runs on the whole batch if the probe finds equal bits."""
    given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
    operands = [given.pop(name, None) for name in ("query", "key", "value")]
    # What a call says beyond the three operands, and what it means by default.
    is_plain = all(value == _ATTENTION[name] for name, value in given.items() if name != "attn_mask")
    places = [trace.place(one) for one in operands if isinstance(one, Tensor)]
    aligned = [isinstance(place, Batched) and address(place.alone) == 0 for place in places]
    if is_plain and given.get("attn_mask") is None and len(aligned) == 3 and all(aligned):
        query, key, value = operands
        if attention_is_independent(query, key, value, trace.samples.count):
            return whole(trace, func, args, kwargs)
    return each(trace, func, args, kwargs)


def _any_complex(args: Args, kwargs: Kwargs) -> bool:
    return any(tensor.is_complex() for _, tensor in tensors_in(args, kwargs))


def _in_whole_vectors(numel: int) -> bool:
    """Tells whether every thread's part of so many elements ends between vectors."""
    threads = torch.get_num_threads()
    # Most kernels give a thread no less than the grain; gelu uses all threads from half of it on.
    counts = {threads, max(1, min(threads, -(-numel // GRAIN)))}
    return numel % _VECTORS == 0 and all(-(-numel // count) % _VECTORS == 0 for count in counts)
