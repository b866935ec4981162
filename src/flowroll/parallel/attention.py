"""Attention of this rank's query rows over the keys of all ranks, each row with the bits that it has on one rank.

On the CPU, `scaled_dot_product_attention` takes queries in blocks of 32, 64 or 256 (by their number), and computes a last
block of 1 to 3 rows with other kernels than any larger one, with other bits; measured with torch 2.13, float32 and bfloat16.
So a shard must not end in such a block unless the whole sequence does, and then it has to be the same block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flowroll.parallel.mesh import Mesh
from flowroll.parallel.shards import Shard

_DISPATCH, _TORCHS = "dispatch_attention_fn", "scaled_dot_product_attention"
_FEW = 3
_SMALLEST_BLOCK = 32


def with_attention(processor: Any, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Any:
    """Makes a processor that runs the code of `processor`, with its attention function wrapped.

    diffusers' processors project, normalise and rotate queries, keys and values, and hand them to one function: the newer ones
    to `dispatch_attention_fn`, the older ones to torch's `F.scaled_dot_product_attention`, with heads before rows. Everything
    around that call stays the model's own code.

    Args:
        processor: A diffusers attention processor.
        wrap: Makes the function to use from the processor's own; both take tensors [batch, rows, heads, channels].

    Raises:
        LookupError: The processor calls neither of these functions.
    """
    own = type(processor).__call__
    names, scope = own.__code__.co_names, dict(own.__globals__)
    if _DISPATCH in names and _DISPATCH in scope:
        scope[_DISPATCH] = wrap(scope[_DISPATCH])
    elif "F" in names and _TORCHS in names:
        scope["F"] = _Functional(wrap)
    else:
        raise LookupError(f"{type(processor).__name__} calls neither {_DISPATCH} nor F.{_TORCHS}")
    call = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    call.__kwdefaults__ = own.__kwdefaults__
    copy: Any = object.__new__(type(f"Gathering{type(processor).__name__}", (type(processor),), {"__call__": call}))
    copy.__dict__.update(processor.__dict__)
    return copy


class _Functional:
    """`torch.nn.functional` with its attention wrapped."""

    def __init__(self, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            query, key, value = (one.transpose(1, 2) for one in (query, key, value))
            return functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

        self._attend = wrap(attend)

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def scaled_dot_product_attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Computes torch's attention through the wrapped function."""
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        return self._attend(query, key, value, **options).transpose(1, 2)


def gather_keys(
    mesh: Mesh,
    rows: Shard,
    key: Float[Tensor, "batch keys heads channels"],
    value: Float[Tensor, "batch keys heads channels"],
    *,
    in_front: bool = False,
) -> tuple[Float[Tensor, "batch all_keys heads channels"], Float[Tensor, "batch all_keys heads channels"]]:
    """Gathers the keys and values of the whole sequence, in the sequence's order, in one collective.

    Args:
        mesh: The mesh of the ranks.
        rows: This rank's rows of the sharded part. The other rows are the same on every rank, and stay where they are.
        key: This rank's keys.
        value: This rank's values.
        in_front: Whether the sharded rows come before the rows that are the same on every rank.
    """
    start = 0 if in_front else key.shape[1] - rows.size
    stop = start + rows.size
    # Stacked behind the batch dimension, which stays first, because a shared forward tells its samples apart by it.
    pair = torch.stack((key[:, start:stop], value[:, start:stop]), dim=1)
    keys, values = mesh.gather(pair, axis="sp", dim=2, sizes=rows.sizes).unbind(1)
    if key.shape[1] == rows.size:
        return keys, values

    def whole(own: Tensor, gathered: Tensor) -> Tensor:
        others = own[:, stop:] if in_front else own[:, :start]
        return torch.cat((gathered, others) if in_front else (others, gathered), dim=1)

    return whole(key, keys), whole(value, values)


def widen_mask(mask: Tensor, rows: Shard, keys: int) -> Tensor:
    """Widens a mask over this rank's keys to the keys of the whole sequence; rows inside a region are never padding.

    Args:
        mask: A boolean mask [..., width].
        rows: This rank's rows of the sharded part.
        keys: The number of keys of the whole sequence.
    """
    if mask.shape[-1] == keys:
        return mask
    front = mask[..., : mask.shape[-1] - rows.size]
    return torch.cat((front, mask.new_ones((*mask.shape[:-1], rows.total))), dim=-1)


def has_last_queries(rows: Shard, own_queries: int, *, in_front: bool) -> bool:
    """Tells whether a rank's queries are the end of the whole sequence; rows after the sharded ones are so on every rank.

    Args:
        rows: Which rows are this rank's.
        own_queries: Queries of this rank, those that every rank has included.
        in_front: Whether this rank's rows stand before the others.
    """
    return rows.is_last or (in_front and own_queries > rows.size)


def attend_own_rows(
    dispatch: Callable[..., Tensor],
    query: Float[Tensor, "batch queries heads channels"],
    key: Float[Tensor, "batch keys heads channels"],
    value: Float[Tensor, "batch keys heads channels"],
    *,
    has_end: bool,
    **options: Any,
) -> Float[Tensor, "batch queries heads channels"]:
    """Computes the attention of this rank's queries, each with the bits that it has on one rank.

    Args:
        dispatch: The model's attention; its mask, if there is one, is the same for all queries.
        query: This rank's query rows, and before or after them the rows that are the same on every rank.
        key: The keys of the whole sequence.
        value: The values of the whole sequence.
        has_end: Whether the last of these queries are the last of the whole sequence.
        **options: Further arguments of `dispatch`.
    """
    if query.device.type != "cpu":
        return dispatch(query, key, value, **options)
    # In self-attention the whole sequence has as many queries as keys.
    end = _few_rows(key.shape[1]) if has_end else 0
    split = query.shape[1] - end
    padded = next(length for length in itertools.count(split) if not _few_rows(length))
    # The first rows are repeated to fill the block.
    body = torch.cat((query[:, :split], query[:, : padded - split]), dim=1) if padded > split else query[:, :split]
    attended = dispatch(body, key, value, **options)[:, :split]
    if end:
        # The rows follow a whole block, as on one rank: computed alone, these few rows would have other bits again.
        tail = dispatch(query[:, split - _SMALLEST_BLOCK :], key, value, **options)[:, _SMALLEST_BLOCK:]
        attended = torch.cat((attended, tail), dim=1)
    return attended


def _few_rows(num_queries: int) -> int:
    """Returns the number of rows in the last block of queries if other kernels compute it; else 0."""
    block = 256 if num_queries >= 768 else 64 if num_queries >= 192 else _SMALLEST_BLOCK
    last = num_queries % block
    return last if last <= _FEW else 0
