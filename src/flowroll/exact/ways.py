"""How one function of a forward is computed when the forward is shared by several samples.

A way is what `rules` decides for a call at the first forward of a shape, and what every later forward of that shape repeats.
`None` stands for the plain call: the function of the whole batch gives every sample its own bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowroll.exact.layout import MemoryLayout, MemoryLayouts, joined, parts_of
from flowroll.exact.padding import Lengths
from flowroll.exact.probe import product


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples that share a forward.

    Attributes:
        count: The number of samples.
        same_conditioning: For each sample, the index of the first sample with the same conditioning (the numbers that a sample
            has for its entries of the batch: timesteps, guidance).
        distinct: The indices of the samples that are the first with their conditioning.
        lengths: The lengths of their texts; None: all are the same, and nothing is padded.
    """

    count: int
    same_conditioning: tuple[int, ...]
    distinct: tuple[int, ...]
    lengths: Lengths | None = None

    @classmethod
    def of(cls, same_conditioning: Sequence[int], lengths: Lengths | None = None) -> Samples:
        """Makes the samples from `same_conditioning`."""
        same = tuple(same_conditioning)
        return cls(len(same), same, tuple(dict.fromkeys(same)), lengths)


# Computes a call of a shared forward: the samples, the function, its arguments; the result has every sample's own bits.
Way: TypeAlias = Callable[[Samples, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
# `Path` is a tensor's place among the arguments (a position or a name, then indices of lists); `Split` adds the address that
# a sample's part has alone.
Path: TypeAlias = "tuple[int | str, ...]"
Split: TypeAlias = "tuple[Path, int]"


@dataclass(frozen=True, slots=True)
class Each:
    """Calls the function with each sample's part of every batched argument, and joins the results.

    Attributes:
        splits: The places of the batched arguments, and the address that a sample's part has alone.
        alone: The layout of the first sample's result.
        of_conditioning: Whether samples of the same conditioning have the same result, as in `Product`.
    """

    splits: tuple[Split, ...]
    alone: MemoryLayout | MemoryLayouts | None
    of_conditioning: bool = False

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Computes the joined results."""
        if all(path == (index,) for index, (path, _) in enumerate(self.splits)):
            # Most functions have their batched arguments first.
            own = [parts_of(value, samples.count, at) for value, (_, at) in zip(args, self.splits, strict=False)]
            rest = args[len(own) :]
            columns_ = list(zip(*own, strict=True))
            if self.of_conditioning and len(samples.distinct) < samples.count:
                found = {first: func(*columns_[first], *rest, **kwargs) for first in samples.distinct}
                return _joined([found[first] for first in samples.same_conditioning], self.alone)
            return _joined([func(*parts, *rest, **kwargs) for parts in columns_], self.alone)
        columns = [(path, parts_of(value_at(args, kwargs, path), samples.count, at)) for path, at in self.splits]
        results = []
        for index in range(samples.count):
            own_args, own_kwargs = list(args), dict(kwargs)
            for path, parts in columns:
                put_at(own_args, own_kwargs, path, parts[index])
            results.append(func(*own_args, **own_kwargs))
        return _joined(results, self.alone)


def _joined(results: Sequence[Any], like: MemoryLayout | MemoryLayouts | None) -> Any:
    """Joins the samples' results: tensors, or tuples and lists of tensors."""
    if isinstance(like, MemoryLayouts):
        return like.kind([_joined(column, one) for column, one in zip(zip(*results, strict=True), like.entries, strict=True)])
    return None if like is None else joined(results, like)


@dataclass(frozen=True, slots=True)
class Product:
    """Computes a linear layer for all samples, merged where the probe found that the bits stay the same.

    Attributes:
        of_conditioning: Whether the input depends on nothing of a sample but its conditioning, so that samples of the same
            conditioning have the same product.
    """

    of_conditioning: bool

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Computes the product."""
        return self.compute(samples, *args, **kwargs)

    def compute(self, samples: Samples, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes the product; the argument names are those of `torch.nn.functional.linear`."""
        if not self.of_conditioning or len(samples.distinct) == samples.count:
            return product(input, samples.count, weight, bias)
        parts = parts_of(input, samples.count)
        found = product(torch.cat([parts[first] for first in samples.distinct]), len(samples.distinct), weight, bias)
        own = dict(zip(samples.distinct, torch.split(found, len(input) // samples.count), strict=True))
        return torch.cat([own[first] for first in samples.same_conditioning])


@dataclass(frozen=True, slots=True)
class Contiguous:
    """Lays out the first argument contiguously before the function is computed.

    Attributes:
        way: How it is computed then; None: by the plain call.
    """

    way: Way | None

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Computes the function."""
        laid_out = (args[0].contiguous(), *args[1:])
        return func(*laid_out, **kwargs) if self.way is None else self.way(samples, func, laid_out, kwargs)


# Equal to itself alone: an index may hold what has no hash.
@dataclass(frozen=True, slots=True, eq=False)
class Sections:
    """Cuts pieces along the first dimension, each within one sample, from the sample's own part.

    Attributes:
        at: The address (modulo the alignment of allocations) that a sample's part has alone.
        pieces: For each piece the index of its sample, and its start and stop within the sample's part.
        rows: Whether a piece is a single row, without the first dimension.
        kind: The type that holds the pieces; None if the function returns a single one.
        rest: The index in the dimensions after the first.
    """

    at: int
    pieces: tuple[tuple[int, int, int], ...]
    rows: bool
    kind: type | None
    rest: tuple[Any, ...] = ()

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Cuts the pieces."""
        parts = parts_of(args[0], samples.count, self.at)
        index = [start if self.rows else slice(start, stop) for _, start, stop in self.pieces]
        found = [parts[sample][(one, *self.rest)] for (sample, _, _), one in zip(self.pieces, index, strict=True)]
        return found[0] if self.kind is None else self.kind(found)


def value_at(args: Sequence[Any], kwargs: Mapping[str, Any], path: Path) -> Any:
    """Returns an argument, or an entry of a list among the arguments."""
    first, *rest = path
    found = kwargs[first] if isinstance(first, str) else args[first]
    for index in rest:
        found = found[index]
    return found


def put_at(args: list[Any], kwargs: dict[str, Any], path: Path, value: Any) -> None:
    """Replaces an argument, or an entry of a list among the arguments, by a value."""
    first, *rest = path
    if not rest:
        if isinstance(first, str):
            kwargs[first] = value
        else:
            assert isinstance(first, int)
            args[first] = value
        return
    # Lists of tensors are one level deep; a copy, since the model owns the list.
    (index,) = rest
    assert isinstance(index, int)
    holder = list(value_at(args, kwargs, (first,)))
    holder[index] = value
    if isinstance(first, str):
        kwargs[first] = holder
    else:
        args[first] = holder
