"""The memory layout of a merged tensor, and how a sample's part is given the layout that the sample has alone.

A batched tensor has the samples along its first dimension, in their order, each with the same number of rows. Kernels choose
their code by strides and, for products of few rows, by the address modulo a cache line. So a part that is computed by itself
must have the strides and the address that the sample's own tensor has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def laid_out_like(tensor: Tensor) -> Tensor:
    """Copies a tensor, with its strides and its address modulo `ALLOCATED`.

    Raises:
        CannotMergeError: No other tensor can be laid out like this.
    """
    copied = _moved(without_repeats(tensor), address(tensor)).expand(tensor.shape)
    if copied.stride() != tensor.stride() or address(copied) != address(tensor):
        raise CannotMergeError("a tensor cannot be laid out as it lies")
    return copied


def without_repeats(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor without the dimensions along which it repeats itself, as an expanded tensor does."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


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


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """The shape and strides of a tensor that itself is gone.

    Attributes:
        shape: The size of each dimension.
        strides: The stride of each dimension, in elements.
        is_contiguous: Whether torch calls such a tensor contiguous.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_contiguous: bool

    @classmethod
    def of(cls, tensor: Tensor) -> MemoryLayout:
        """Returns the layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.is_contiguous())

    def is_of(self, tensor: Tensor) -> bool:
        """Tells whether a tensor has this shape, and these strides in each dimension with more than one element."""
        strides = tensor.stride()
        return tensor.shape == self.shape and (strides == self.strides or _same_strides(self.shape, strides, self.strides))


def joined(parts: Sequence[Tensor], like: MemoryLayout) -> Tensor:
    """Joins the samples' own results into one batched tensor, in which each part has the layout `like`.

    Raises:
        CannotMergeError: The results differ in layout, or these strides leave no room for other samples.
    """
    shape, strides = like.shape, like.strides
    if not shape or not all(map(like.is_of, parts)):
        raise CannotMergeError("results of samples have no common shape with a first dimension")
    if like.is_contiguous:
        return torch.cat(list(parts))
    outer = [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size > 1]
    if shape[0] > 1 and any(stride >= strides[0] for stride in outer):
        raise CannotMergeError("the first dimension is not the outermost in memory")
    dense = _dense_strides(shape, strides)
    if dense is None:
        raise CannotMergeError("a result has gaps in memory")
    first = parts[0]
    batched = torch.empty_strided((len(parts) * shape[0], *shape[1:]), dense, dtype=first.dtype, device=first.device)
    for index, part in enumerate(parts):
        batched.narrow(0, index * shape[0], shape[0]).copy_(part)
    return batched


def _dense_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
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
    return _same_strides(alone.shape, batched.stride(), alone.stride())


def _same_strides(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Tells whether strides are the same in each dimension with more than one element."""
    return all(size <= 1 or first == second for size, first, second in zip(shape, one, other, strict=True))


def is_outermost(tensor: Tensor) -> bool:
    """Tells whether the first dimension is outermost, so that its length does not change the other strides."""
    others = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    return tensor.stride(0) == 0 or all(size * stride <= tensor.stride(0) for size, stride in others)


@dataclass(frozen=True, slots=True)
class MemoryLayouts:
    """The layouts of the tensors in a tuple or list, which may hold others and None.

    Attributes:
        kind: The type of the tuple or list.
        entries: The layouts, one per entry.
    """

    kind: type
    entries: tuple[MemoryLayout | MemoryLayouts | None, ...]


def layout_of(result: Any) -> MemoryLayout | MemoryLayouts | None:
    """Returns the layout of a tensor, or of the tensors in a tuple or list.

    Raises:
        CannotMergeError: There is something else in it.
    """
    if isinstance(result, Tensor):
        return MemoryLayout.of(result)
    if isinstance(result, (tuple, list)):
        return MemoryLayouts(type(result), tuple(map(layout_of, result)))
    if result is not None:
        raise CannotMergeError("a function of the samples' data returns no tensor")
    return None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors hold the same numbers; NaN counts as equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    unordered = (one != one) & (other != other)
    return bool((unordered | (one == other)).all())


def same_outputs(one: Tensor | list[Tensor], other: Tensor | list[Tensor]) -> bool:
    """Tells whether two outputs of a model, tensors or lists of them, hold the same numbers; see `same_bits`."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return len(one) == len(other) and all(map(same_bits, one, other))
