"""Asks the kernels whether a number has the same bits in gradient mode, and when a rank computes a part of the whole.

`probe` asks about several samples in one forward, whose answer decides how that forward is computed. There is no other way to
compute with gradients, or on several ranks: what differs here is shown, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.exact.findings import asked
from flowroll.exact.probe import Setting, cancelling_product, cancelling_rows, telling_attention
from flowroll.parallel.attention import attend_own_rows
from flowroll.parallel.shards import Shard, shard_rows

# Output columns, input columns, and whether there is a bias.
Weight: TypeAlias = "tuple[int, int, bool]"
# The rows of a text before the sharded ones: with them every shard ends in few rows, for which kernels have other code.
_IN_FRONT = 33

# Heads, and channels of each.
Heads: TypeAlias = "tuple[int, int]"


@asked("product with gradients")
def product_keeps_bits_with_gradients(rows: int, weight: Weight, setting: Setting) -> bool:
    """Tells whether a linear layer computes alike in gradient mode and without."""
    return all(_alike_with_gradients(F.linear, *given) for given in _products(rows, weight, setting))


@asked("attention with gradients")
def attention_keeps_bits_with_gradients(rows: int, heads: Heads, setting: Setting) -> bool:
    """Tells whether attention computes alike in gradient mode and without."""
    return all(_alike_with_gradients(_attend, *given) for given in _attention(rows, heads, setting))


@asked("product by rows")
def product_keeps_bits_by_rows(rows: int, ranks: int, weight: Weight, setting: Setting) -> bool:
    """Tells whether the rows of a linear layer have their bits when each rank computes its shard of them."""

    def parts(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        return (F.linear(part, matrix, bias) for part in _shards(inputs, ranks))

    return all(_alike(parts(*given), F.linear(*given), dim=1) for given in _products(rows, weight, setting))


@asked("product by columns")
def product_keeps_bits_by_columns(rows: int, ranks: int, weight: Weight, setting: Setting) -> bool:
    """Tells whether the columns of a linear layer have their bits when each rank computes its own."""

    def parts(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        biases: Sequence[Tensor | None] = [None] * ranks if bias is None else bias.chunk(ranks)
        # Cloned, since a rank's part is a weight of its own.
        return (F.linear(inputs, part.clone(), own) for part, own in zip(matrix.chunk(ranks), biases, strict=True))

    return all(_alike(parts(*given), F.linear(*given), dim=-1) for given in _products(rows, weight, setting))


@asked("attention by rows")
def attention_keeps_bits_by_rows(rows: int, ranks: int, heads: Heads, setting: Setting) -> bool:
    """Tells whether queries have their bits when each rank attends with its shard of them, behind a text, over all keys."""

    def parts(query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        front = query[:, :_IN_FRONT]
        for rank, part in enumerate(_shards(query[:, _IN_FRONT:], ranks)):
            own = torch.cat((front, part), dim=1)
            attended = attend_own_rows(_attend, own, key, value, has_end=rank == ranks - 1)
            yield attended if rank == 0 else attended[:, _IN_FRONT:]

    made = _attention(_IN_FRONT + rows, heads, setting)
    return all(_alike(parts(*given), _attend(*given), dim=1) for given in made)


@asked("mean by rows")
def mean_keeps_bits_by_rows(rows: int, ranks: int, width: int, setting: Setting) -> bool:
    """Tells whether means along the rows have their bits when each rank computes its shard of them."""
    values = cancelling_rows(torch.Size((1, rows, width)), *setting[:2])
    return _alike((part.mean(-1) for part in _shards(values, ranks)), values.mean(-1), dim=1)


def _products(rows: int, weight: Weight, setting: Setting) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yields inputs [1, rows, columns], weight and bias: whose products are rounding errors, then ordinary numbers.

    Few bfloat16 columns may have no rounding errors, and there is nothing that could be done instead of the product.
    """
    outputs, columns, has_bias = weight
    inputs, matrix, bias = cancelling_product(torch.Size((1, rows, columns)), torch.Size((outputs, columns)), *setting[:2])
    yield inputs, matrix.requires_grad_(), bias if has_bias else None
    generator = torch.Generator(inputs.device).manual_seed(1)
    ordinary = [torch.empty_like(one).normal_(generator=generator) for one in (inputs, matrix, bias)]
    yield ordinary[0], ordinary[1].requires_grad_(), ordinary[2] if has_bias else None


def _attention(rows: int, heads: Heads, setting: Setting) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields queries, keys and values [1, rows, heads, channels]."""
    shape = torch.Size((1, heads[0], rows, heads[1]))
    for query, key, value in telling_attention(shape, shape, (True, True, True), *setting[:2]):
        yield query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _shards(tensor: Tensor, ranks: int) -> list[Tensor]:
    """Returns every rank's rows of a tensor [batch, rows, ...], each in memory of its own."""
    shards = [shard_rows(tensor.shape[1], rank, ranks) for rank in range(ranks)]
    assert all(isinstance(shard, Shard) for shard in shards)
    return [tensor.narrow(1, shard.start, shard.size).contiguous() for shard in shards if shard]


def _alike(parts: Iterable[Tensor], whole: Tensor, *, dim: int) -> bool:
    return torch.equal(torch.cat(list(parts), dim=dim), whole)


def _alike_with_gradients(func: Callable[..., Tensor], *operands: Tensor | None) -> bool:
    with torch.no_grad():
        without = func(*operands)
    with torch.enable_grad():
        found = func(*(one if one is None else one.detach().requires_grad_() for one in operands))
    return torch.equal(found.detach(), without)
