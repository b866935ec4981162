"""Which samples a tensor belongs to during the analysis of a shared forward.

A tensor that the model had before the forward (weights, tables) has no place: it is the same for every sample. Every other
tensor is of one of three kinds, and has a counterpart in the forward of a sample alone:

- `Batched`: the samples' counterparts one behind the other along the first dimension.
- `Own`: the counterpart itself, of one sample. Models that take lists have these.
- `Constant`: made in the forward from no sample's data, as positions and masks are. Its counterpart is the same, or, where
  it is as long as a batched tensor that it meets, one sample's part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowroll.exact.layout import CannotMergeError
from flowroll.exact.padding import Padding
from flowroll.exact.ways import Path


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The samples that a tensor belongs to.

    Attributes:
        trace: The token of the analysis that set the place; the place means nothing in another analysis.
    """

    trace: Any


@dataclass(frozen=True, slots=True, eq=False)
class Batched(Place):
    """The place of a tensor that holds all samples along its first dimension.

    Attributes:
        alone: The first sample's own tensor.
        is_conditioning: Whether the tensor depends on nothing of a sample but its conditioning.
        padding: Where the texts of the samples are padded; None: the samples' own tensors have the same shape.
    """

    alone: Tensor
    is_conditioning: bool
    padding: Padding | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Own(Place):
    """The place of a tensor that belongs to one sample."""

    sample: int


@dataclass(frozen=True, slots=True, eq=False)
class Constant(Place):
    """The place of a tensor that was made in the forward from no sample's data.

    Attributes:
        is_exact: Whether every element has the same bits whatever the number of elements.
        is_fresh: Whether the memory was allocated in this forward, so that it may be written to.
    """

    is_exact: bool
    is_fresh: bool


def all_tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a value, however deep they lie in its lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from all_tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from all_tensors(one)


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Yields the tensors among the arguments, and in lists and tuples among them, each with its place there."""
    named: Iterator[tuple[int | str, Any]] = itertools.chain(enumerate(args), kwargs.items())
    for key, value in named:
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, (list, tuple)):
            for index, one in enumerate(value):
                if isinstance(one, Tensor):
                    yield (key, index), one
                elif isinstance(one, (list, tuple)) and any(isinstance(deep, Tensor) for deep in one):
                    raise CannotMergeError("tensors lie in lists of lists")
