"""How one function of a forward is computed when the forward is shared by several samples.

A way is what `rules` decides for a call at the first forward of a shape, and what every later forward of that shape repeats.
`None` stands for the plain call: the function of the whole batch has every sample's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowroll.exact.layout import CannotMergeError, joined, parts_of
from flowroll.exact.probe import product


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples that share a forward.

    Attributes:
        count: How many.
        same_conditioning: For each the first one with the same conditioning (the numbers that a sample gives its entries of the
            batch: timesteps, guidance).
        distinct: Those that are the first of their conditioning.
    """

    count: int
    same_conditioning: tuple[int, ...]
    distinct: tuple[int, ...]

    @classmethod
    def of(cls, same_conditioning: Sequence[int]) -> Samples:
        """From the first sample of the same conditioning, for each sample."""
        same = tuple(same_conditioning)
        return cls(len(same), same, tuple(dict.fromkeys(same)))


# Computes a call of a shared forward: the samples, the function, its arguments; the result has every sample's own bits.
Way: TypeAlias = Callable[[Samples, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
# Where a tensor stands among the arguments (a position or a name, then indices of lists), and its address alone.
Path: TypeAlias = "tuple[int | str, ...]"
Split: TypeAlias = "tuple[Path, int]"


@dataclass(frozen=True, slots=True)
class Each:
    """The function of each sample's part of every batched argument, and the results joined.

    Attributes:
        splits: The batched arguments.
        alone: The result of the first sample, for its shapes and strides.
    """

    splits: tuple[Split, ...]
    alone: Any

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The joined results."""
        if all(path == (index,) for index, (path, _) in enumerate(self.splits)):
            # The first arguments, as with most functions.
            own = [parts_of(value, samples.count, at) for value, (_, at) in zip(args, self.splits, strict=False)]
            rest = args[len(own) :]
            return join_tree([func(*parts, *rest, **kwargs) for parts in zip(*own, strict=True)], self.alone)
        columns = [(path, parts_of(_at(args, kwargs, path), samples.count, at)) for path, at in self.splits]
        results = []
        for index in range(samples.count):
            own_args, own_kwargs = list(args), dict(kwargs)
            for path, parts in columns:
                put_at(own_args, own_kwargs, path, parts[index])
            results.append(func(*own_args, **own_kwargs))
        return join_tree(results, self.alone)


def join_tree(results: Sequence[Any], alone: Any) -> Any:
    """Joins the samples' results: tensors, or tuples and lists of tensors."""
    if isinstance(alone, Tensor):
        return joined(results, alone)
    if isinstance(alone, (tuple, list)):
        columns = [join_tree(column, one) for column, one in zip(zip(*results, strict=True), alone, strict=True)]
        return type(alone)(columns)
    if alone is None:
        return None
    raise CannotMergeError("a function of the samples' data returns no tensor")


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer, merged as far as the kernels' answers allow.

    Attributes:
        of_conditioning: The input depends on nothing of a sample but its conditioning, so that samples of the same
            conditioning have the same product.
    """

    of_conditioning: bool

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The product."""
        return self.compute(samples, *args, **kwargs)

    def compute(self, samples: Samples, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product; the names are those of `torch.nn.functional.linear`."""
        if not self.of_conditioning or len(samples.distinct) == samples.count:
            return product(input, samples.count, weight, bias)
        parts = parts_of(input, samples.count)
        found = product(torch.cat([parts[first] for first in samples.distinct]), len(samples.distinct), weight, bias)
        own = dict(zip(samples.distinct, torch.split(found, len(input) // samples.count), strict=True))
        return torch.cat([own[first] for first in samples.same_conditioning])


@dataclass(frozen=True, slots=True)
class Sections:
    """Pieces along the first dimension, each within one sample, cut from the sample's own part.

    Attributes:
        at: The address of a part alone.
        pieces: Sample, start and stop within its part.
        rows: Whether a piece is a row without the first dimension.
        kind: What holds the pieces; None where the function returns a single one.
        rest: The rest of the index behind the first dimension.
    """

    at: int
    pieces: tuple[tuple[int, int, int], ...]
    rows: bool
    kind: type | None
    rest: tuple[Any, ...] = ()

    def __call__(self, samples: Samples, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The pieces."""
        parts = parts_of(args[0], samples.count, self.at)
        index = [start if self.rows else slice(start, stop) for _, start, stop in self.pieces]
        found = [parts[sample][(one, *self.rest)] for (sample, _, _), one in zip(self.pieces, index, strict=True)]
        return found[0] if self.kind is None else self.kind(found)


def _at(args: Sequence[Any], kwargs: Mapping[str, Any], path: Path) -> Any:
    first, *rest = path
    found = kwargs[first] if isinstance(first, str) else args[first]
    for index in rest:
        found = found[index]
    return found


def put_at(args: list[Any], kwargs: dict[str, Any], path: Path, value: Any) -> None:
    """Puts a value in the place of an argument, or of an entry of a list among the arguments."""
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
    holder = list(_at(args, kwargs, (first,)))
    holder[index] = value
    if isinstance(first, str):
        kwargs[first] = holder
    else:
        args[first] = holder
