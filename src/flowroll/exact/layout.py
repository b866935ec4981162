"""The memory layout of a merged tensor, and how a sample's part is given the layout that the sample has alone.

A batched tensor has the samples along its first dimension, in their order, each with the same number of rows. Kernels choose
their code by strides and, for products of few rows, by the address modulo a cache line. So a part that is computed by itself
must have the strides and the address that the sample's own tensor has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# torch's allocator puts every tensor at a multiple of this many bytes; the bits of products of few rows depend on it.
ALLOCATED = 64


class CannotMergeError(Exception):
    """It is not certain that this forward can be shared without a changed bit. The error never leaves the package."""


def address(tensor: Tensor) -> int:
    """Returns the address of a tensor's first element, modulo the alignment of allocations."""
    return tensor.data_ptr() % ALLOCATED


def parts_of(batched: Tensor, num_samples: int, at: int = 0) -> list[Tensor]:
    """Returns each sample's part of a batched tensor, at the address (modulo `ALLOCATED`) that it has alone.

    Args:
        batched: A tensor with the samples along its first dimension.
        num_samples: The number of samples.
        at: The address that a part has alone, modulo `ALLOCATED`.
    """
    assert len(batched) % num_samples == 0
    parts = torch.split(batched, len(batched) // num_samples)
    return [part if part.data_ptr() % ALLOCATED == at else _moved(part, at) for part in parts]


def _moved(part: Tensor, at: int) -> Tensor:
    """Copies a part to another address, with the same strides."""
    if at == 0 and part.is_contiguous():
        return part.clone()
    if at % part.element_size() or any(
        size > 1 and stride == 0 for size, stride in zip(part.shape, part.stride(), strict=True)
    ):
        raise CannotMergeError("a part cannot be laid out as it lies alone")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    start = at // part.element_size()
    buffer = part.new_zeros(start + extent)
    return buffer.as_strided(part.shape, part.stride(), start).copy_(part)


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Joins the samples' own results into one batched tensor, in which each part has the strides of `like`.

    Raises:
        CannotMergeError: The results differ in shape, or these strides leave no room for other samples.
    """
    shape, strides = like.shape, like.stride()
    if not shape or any(part.shape != shape or (part.stride() != strides and not same_strides(part, like)) for part in parts):
        raise CannotMergeError("results of samples have no common shape with a first dimension")
    if like.is_contiguous():
        return torch.cat(list(parts))
    outer = [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size > 1]
    if shape[0] > 1 and any(stride >= strides[0] for stride in outer):
        raise CannotMergeError("the first dimension is not the outermost in memory")
    dense = _dense_strides(shape, strides)
    if dense is None:
        raise CannotMergeError("a result has gaps in memory")
    options = {"dtype": like.dtype, "device": parts[0].device}
    batched = torch.empty_strided((len(parts) * shape[0], *shape[1:]), dense, **options)  # type: ignore[arg-type]
    for index, part in enumerate(parts):
        batched.narrow(0, index * shape[0], shape[0]).copy_(part)
    return batched


def _dense_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the strides of a longer tensor, the first dimension outermost; None if a part's own have gaps or overlap."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return None
            expected *= size
    return (expected // shape[0], *strides[1:])


def same_layout(batched: Tensor, alone: Tensor, num_samples: int) -> bool:
    """Tells whether a sample's part of `batched` has the shape, the strides and the dtype of `alone`."""
    if batched.ndim != alone.ndim or not alone.ndim or batched.dtype != alone.dtype:
        return False
    rows, *sizes = alone.shape
    if batched.shape[0] != num_samples * rows or list(batched.shape[1:]) != sizes:
        return False
    return same_strides(batched, alone)


def same_strides(one: Tensor, alone: Tensor) -> bool:
    """Tells whether the strides are those of `alone` in each dimension with more than one element."""
    both = zip(alone.shape, one.stride(), alone.stride(), strict=True)
    return all(size <= 1 or stride == other for size, stride, other in both)


def is_outermost(tensor: Tensor) -> bool:
    """Tells whether the first dimension is outermost, so that its length does not change the other strides."""
    others = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return tensor.stride(0) == 0 or all(size * stride <= tensor.stride(0) for size, stride in others)


def outline(tree: Any) -> Any:
    """Returns a tensor, or tensors in tuples and lists, with the same shapes and strides on the meta device."""
    if isinstance(tree, Tensor):
        return torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype, device="meta")
    if isinstance(tree, (tuple, list)):
        return type(tree)([outline(one) for one in tree])
    return tree


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors hold the same numbers; NaN counts as equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    unordered = (one != one) & (other != other)
    return bool((unordered | (one == other)).all())
