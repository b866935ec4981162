"""The form of a forward's arguments: everything about them but the numbers in their tensors.

Two forwards of one model whose arguments have the same form run the same functions on tensors that lie alike, unless the model
reads numbers. A form is a key, and arguments can be made of it and other tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowroll.exact.layout import address, laid_out_like, without_repeats


class NoFormError(Exception):
    """An argument is neither a tensor nor a plain value, so nothing can be said about another one of its kind."""


@dataclass(frozen=True, slots=True)
class TensorForm:
    """How a tensor lies in memory.

    Attributes:
        kind: Its class.
        shape: The size of each dimension.
        strides: The stride of each dimension, in elements.
        dtype: Its dtype.
        device: Its device.
        address: Its address modulo the alignment of allocations; 0 if it holds one number, as the timestep does, which is a
            slice of all of them: no kernel takes a number otherwise because of where it lies.
    """

    kind: type
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    address: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    kind: type
    items: tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class _Mapping:
    names: tuple[str, ...]
    items: tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class _Plain:
    # The text tells 1 from 1.0 and True, and 0.0 from -0.0, which are equal.
    text: str
    value: Hashable


def form_of(value: Any, tensors: list[Tensor]) -> Hashable:
    """Returns the form of a value, and appends the tensors in it to a list, in their order.

    Raises:
        NoFormError: There is something else in it than tensors, numbers, texts, None, lists, tuples and mappings of names.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        place = 0 if without_repeats(value).numel() == 1 else address(value)
        return TensorForm(type(value), tuple(value.shape), value.stride(), value.dtype, value.device, place)
    if type(value) in (list, tuple):
        return _Sequence(type(value), tuple(form_of(item, tensors) for item in value))
    if isinstance(value, Mapping):
        return _Mapping(tuple(value), tuple(form_of(item, tensors) for item in value.values()))
    if value is None or type(value) in (bool, int, float, str):
        return _Plain(repr(value), value)
    raise NoFormError(f"a {type(value).__name__} is neither a tensor nor a plain value")


def filled(form: Hashable, tensors: Iterator[Tensor]) -> Any:
    """Makes a value of this form, with new lists and mappings, and with these tensors in their order."""
    if isinstance(form, TensorForm):
        return next(tensors)
    if isinstance(form, _Sequence):
        return form.kind(filled(item, tensors) for item in form.items)
    if isinstance(form, _Mapping):
        return {name: filled(item, tensors) for name, item in zip(form.names, form.items, strict=True)}
    assert isinstance(form, _Plain)
    return form.value


class Buffers:
    """Copies of tensors that lie as these do, and take other numbers later.

    Args:
        tensors: The tensors.

    Attributes:
        tensors: The copies.

    Raises:
        CannotMergeError: A tensor cannot be laid out like this again.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = [laid_out_like(tensor) for tensor in tensors]
        self._targets = [without_repeats(tensor) for tensor in self.tensors]

    def fill(self, tensors: list[Tensor]) -> None:
        """Copies the numbers of tensors of the same forms."""
        for target, tensor in zip(self._targets, tensors, strict=True):
            target.copy_(without_repeats(tensor))
