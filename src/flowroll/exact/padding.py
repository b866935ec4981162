"""Texts of several lengths in one batch: padded to a common length, and cut where a function must not see the padding.

A padded tensor holds, along one dimension, a sample's text rows, then padding, then whatever follows the text (an image). The
numbers in the padding are arbitrary and finite; no function may carry them into another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flowroll.exact.layout import CannotMergeError

# How many batches of texts have their indices remembered.
_BATCHES = 256
# Texts are padded to a multiple of this many rows, so that there are few kinds of forwards.
_MULTIPLE = 4


def padded_length(longest: int) -> int:
    """Returns the number of rows to which texts are padded of which the longest has so many."""
    return -(-longest // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of the texts that share a forward.

    Attributes:
        own: The number of text rows of each sample, ascending; they are not all the same.
        padded: The number of rows to which all are padded, more than the first sample has.
    """

    own: tuple[int, ...]
    padded: int

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbors of the same length: the first sample, the one after the last, and the length."""
        return _runs(self.own)

    @property
    def missing(self) -> int:
        """The rows of padding that the first sample has."""
        return self.padded - self.own[0]


@dataclass(frozen=True, slots=True)
class Padding:
    """Where a padded tensor has its padding.

    Attributes:
        dim: The dimension of the rows; never the first one, which is the samples'.
        start: The number of rows in front of the text.
    """

    dim: int
    start: int


@lru_cache(maxsize=_BATCHES)
def _runs(own: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    starts = [index for index, length in enumerate(own) if index == 0 or own[index - 1] != length]
    return tuple((start, stop, own[start]) for start, stop in zip(starts, [*starts[1:], len(own)], strict=True))


def cut(tensor: Tensor, padding: Padding, length: int, padded: int) -> Tensor:
    """Cuts the padding out, and returns the rows in the order of memory in which they lie."""
    return _in_memory_order(tensor, padding, length, padded, None) if length < padded else tensor


def fill(tensor: Tensor, padding: Padding, length: int, padded: int) -> Tensor:
    """Puts zeros where `cut` took rows away."""
    return _in_memory_order(tensor, padding, length, length, padded - length) if length < padded else tensor


def _in_memory_order(tensor: Tensor, padding: Padding, length: int, taken: int, zeros: int | None) -> Tensor:
    """Replaces the rows after the text's own, up to `taken` of the text's, by so many zeros."""
    order = memory_order(tensor)
    rows, dim = tensor.permute(order), order.index(padding.dim)
    pieces = [rows.narrow(dim, 0, padding.start + length)]
    if zeros is not None:
        pieces.append(rows.new_zeros((*rows.shape[:dim], zeros, *rows.shape[dim + 1 :])))
    behind = rows.shape[dim] - padding.start - taken
    if behind:
        pieces.append(rows.narrow(dim, padding.start + taken, behind))
    found = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].contiguous()
    return found.permute([order.index(one) for one in range(tensor.ndim)])


def memory_order(tensor: Tensor) -> list[int]:
    """Returns the dimensions from the outermost in memory to the innermost."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True)


@lru_cache(maxsize=_BATCHES)
def row_indices(lengths: Lengths, start: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Returns where the rows of all samples lie, for tensors of two dimensions that hold the samples one behind the other.

    Args:
        lengths: The lengths of the texts.
        start: The number of rows in front of a sample's text.
        size: The number of rows of a padded sample.
        device: The device of the indices.

    Returns:
        The samples' own rows among the padded ones; for each padded row its place among the own ones, or that of the sample's
        first row; the number of own rows of each run.
    """
    own: list[int] = []
    places: list[int] = []
    for sample, length in enumerate(lengths.own):
        rows = [*range(start + length), *range(start + lengths.padded, size)]
        known = {row: len(own) + place for place, row in enumerate(rows)}
        places += [known.get(row, len(own)) for row in range(size)]
        own += [sample * size + row for row in rows]
    sizes = tuple((stop - first) * (size - lengths.padded + length) for first, stop, length in lengths.runs)
    return torch.tensor(own, device=device), torch.tensor(places, device=device), sizes


def same_padded_layout(padded: Tensor, alone: Tensor, padding: Padding, lengths: Lengths, num_samples: int) -> bool:
    """Tells whether a padded tensor lies in memory as a sample's own does, but for the number of rows.

    Args:
        padded: The padded tensor of all samples.
        alone: The first sample's own.
        padding: Where the padding is.
        lengths: The lengths of the texts.
        num_samples: The number of samples.
    """
    shape = [num_samples * len(alone), *alone.shape[1:]]
    shape[padding.dim] += lengths.missing
    if list(padded.shape) != shape or padded.dtype != alone.dtype:
        return False
    inner, own = padded.stride(padding.dim), alone.stride(padding.dim)

    def is_alike(dim: int) -> bool:
        one, other = padded.stride(dim), alone.stride(dim)
        # Strides of what lies outside of the rows grow with them.
        return shape[dim] <= 1 or (one == other if other <= own else one > inner)

    return inner == own and all(map(is_alike, range(1, alone.ndim)))


def moved(padding: Padding, padded: Sequence[int], alone: Sequence[int], rows: int) -> Padding:
    """Returns where the padding is in a result, by its shape and the shape of the first sample's own.

    Raises:
        CannotMergeError: It is in no one dimension.
    """
    differing = [dim for dim, (one, other) in enumerate(zip(padded, alone, strict=False)) if dim and one != other]
    if len(padded) != len(alone) or len(differing) != 1 or padded[differing[0]] - alone[differing[0]] != rows:
        raise CannotMergeError(f"a result of {list(padded)} where a sample alone has {list(alone)}")
    return Padding(differing[0], padding.start)
