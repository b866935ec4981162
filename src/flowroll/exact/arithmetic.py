"""Rules for functions that compute numbers: element-wise functions, reductions of rows, products, attention.

Their bits depend on the kernels, which differ with the place of an element and the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowroll.exact.calls import Args, Decision, Kwargs, alone_of, any_complex, argument, each, is_aligned, whole
from flowroll.exact.functions import CASTS, COPIES, SUMS, named
from flowroll.exact.layout import ALLOCATED, address
from flowroll.exact.probe import attention_is_independent, convolution_is_independent, norm_is_independent, rows_are_independent
from flowroll.exact.tracking import Batched, tensors_in
from flowroll.exact.ways import Contiguous, Product

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
    return (whole if rounds_once(func, args, kwargs) else pointwise)(trace, func, args, kwargs)


def rounds_once(func: Any, args: Args, kwargs: Kwargs) -> bool:
    """Tells whether a function of `ELEMENTWISE`, called so, rounds once per element; a scale or complex numbers take more."""
    return not ("alpha" in kwargs or "rounding_mode" in kwargs or (any_complex(args, kwargs) and func not in COPIES))


def pointwise(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles functions of several operations per element, whose bits differ at the end of a tensor or of a thread's part."""
    if not is_aligned(trace, args, kwargs):
        return each(trace, func, args, kwargs)
    alone_args, alone_kwargs, _ = alone_of(trace, func, args, kwargs)
    alone = func(*alone_args, **alone_kwargs)
    own = alone.numel()
    keeps = keeps_vectors([tensor for _, tensor in tensors_in(args, kwargs)], alone, (own, own * trace.samples.count))
    return (whole if keeps else each)(trace, func, args, kwargs)


def keeps_vectors(operands: Sequence[Tensor], alone: Tensor, sizes: Iterable[int]) -> bool:
    """Tells whether elements lie at the same places of vectors in a sample alone and in the batch.

    Args:
        operands: The tensors of the call, batched.
        alone: The first sample's own result.
        sizes: The numbers of elements that samples' own results and the batched one have.
    """
    if alone.device.type != "cpu":
        return True
    full = [tensor for tensor in operands if tensor.ndim == alone.ndim]
    is_dense = all(tensor.is_contiguous() for tensor in full)
    if is_dense and _goes_row_by_row(operands, alone):
        return all(_in_parts_of(size, alone.shape[-1]) for size in sizes)
    return (is_dense or alone.shape[-1] % _VECTORS == 0) and all(_in_parts_of(size, _VECTORS) for size in sizes)


def _goes_row_by_row(operands: Sequence[Tensor], alone: Tensor) -> bool:
    """Tells whether the innermost loop of the kernel is the last dimension alone: an operand is the same for several rows."""
    if alone.ndim < 2 or alone.shape[-1] == 1 or alone.shape[-2] == 1:
        return False
    lie_in_rows = all(one.ndim >= 2 and one.shape[-1] == alone.shape[-1] and one.stride(-1) == 1 for one in operands)
    return lie_in_rows and any(one.shape[-2] == 1 for one in operands)


def power(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles powers: a square is one product per element, and other exponents are several operations."""
    return (elementwise if is_square(args) else pointwise)(trace, func, args, kwargs)


def is_square(args: Args) -> bool:
    """Tells whether the exponent is 2."""
    return len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 2


def inverse_root(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles rsqrt: two rounded operations, between which bfloat16 is rounded or not, depending on the element's place."""
    return (elementwise if is_wide(args, kwargs) else pointwise)(trace, func, args, kwargs)


def is_wide(args: Args, kwargs: Kwargs) -> bool:
    """Tells whether all tensors have 32 bits or more for a number."""
    return all(tensor.dtype in (torch.float32, torch.float64) for _, tensor in tensors_in(args, kwargs))


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


def convolution(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles a convolution: the probe tells whether the samples may be convolved together."""
    if not _is_of_batch(trace, args, kwargs) or len(args) != 7 or kwargs or args[6] != 1:
        return each(trace, func, args, kwargs)
    _, weight, bias, *options = args[:6]
    are_known = all(isinstance(one, tuple) for one in options) and not weight.data_ptr() % ALLOCATED
    return _in_format(
        trace,
        func,
        args,
        kwargs,
        lambda batch: (
            are_known and convolution_is_independent(named(func), batch, weight, bias is not None, options, trace.samples.count)
        ),
    )


def group_norm(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles norms of groups of channels: the probe tells whether those of all samples may be computed together."""
    groups = argument(args, kwargs, 1, "num_groups", None)
    if not _is_of_batch(trace, args, kwargs):
        return each(trace, func, args, kwargs)
    return _in_format(
        trace, func, args, kwargs, lambda batch: norm_is_independent("group_norm", batch, groups, trace.samples.count)
    )


def _in_format(trace: Any, func: Any, args: Args, kwargs: Kwargs, is_independent: Callable[[Tensor], bool]) -> Decision:
    """Handles a function that chooses a memory format by the strides of its first argument.

    A batch may have the strides of a format where a sample alone has not, because the stride of its only entry may be any. Then
    the sample's result is contiguous, and so the batch is laid out like that first.
    """
    alone_args, alone_kwargs, _ = alone_of(trace, func, args, kwargs)
    place, batch, alone = trace.place(args[0]), args[0], func(*alone_args, **alone_kwargs)
    is_laid_out = batch.is_contiguous() or not alone.is_contiguous()
    if not is_laid_out:
        batch = batch.contiguous()
        trace.put_batched(batch, place.alone.contiguous(), place.is_conditioning)
    result, way = (whole if is_independent(batch) else each)(trace, func, (batch, *args[1:]), kwargs)
    if is_laid_out:
        return result, way
    trace.put_batched(result, alone, place.is_conditioning)
    return result, Contiguous(way)


def interpolate(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles resizing: taking the nearest element copies, other modes run per sample."""
    is_copy = argument(args, kwargs, 3, "mode", "nearest") in ("nearest", "nearest-exact")
    if not is_copy or not _is_of_batch(trace, args, kwargs):
        return each(trace, func, args, kwargs)
    return _in_format(trace, func, args, kwargs, lambda batch: True)


def normalize(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles division by the norm along one dimension: the probe tells as for `group_norm`."""
    dim = argument(args, kwargs, 2, "dim", 1)
    is_known = _is_of_batch(trace, args, kwargs) and is_wide(args, kwargs) and argument(args, kwargs, 1, "p", 2.0) == 2
    is_known = is_known and isinstance(dim, int) and dim % args[0].ndim != 0
    is_exact = is_known and norm_is_independent("normalize", args[0], dim, trace.samples.count)
    return (whole if is_exact else each)(trace, func, args, kwargs)


def _is_of_batch(trace: Any, args: Args, kwargs: Kwargs) -> bool:
    """Tells whether the first argument alone is batched, and lies in each sample as an allocation does."""
    place = trace.place(args[0]) if args and isinstance(args[0], Tensor) else None
    others = [trace.place(one) for path, one in tensors_in(args, kwargs) if path != (0,)]
    return isinstance(place, Batched) and not address(place.alone) and not any(others)


def attention(trace: Any, func: Any, args: Args, kwargs: Kwargs) -> Decision:
    """Handles attention: plain attention without a mask runs on the whole batch if the probe finds equal bits."""
    operands, is_plain = plain_attention(args, kwargs)
    places = [trace.place(one) for one in operands if isinstance(one, Tensor)]
    aligned = [isinstance(place, Batched) and address(place.alone) == 0 for place in places]
    if is_plain and len(aligned) == 3 and all(aligned):
        query, key, value = operands
        if attention_is_independent(query, key, value, trace.samples.count):
            return whole(trace, func, args, kwargs)
    return each(trace, func, args, kwargs)


def plain_attention(args: Args, kwargs: Kwargs) -> tuple[list[Any], bool]:
    """Returns query, key and value, and whether the call has no mask and says nothing beyond them but the defaults."""
    given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
    operands = [given.pop(name, None) for name in ("query", "key", "value")]
    has_mask = given.pop("attn_mask", None) is not None
    return operands, not has_mask and all(value == _ATTENTION[name] for name, value in given.items())


def _in_parts_of(numel: int, unit: int) -> bool:
    """Tells whether every thread's part of so many elements is a multiple of a unit."""
    threads = torch.get_num_threads()
    # Most kernels give a thread no less than the grain; gelu uses all threads from half of it on.
    counts = {threads, max(1, min(threads, -(-numel // GRAIN)))}
    return numel % unit == 0 and all(-(-numel // count) % unit == 0 for count in counts)
