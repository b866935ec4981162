"""Attention of own query rows over everybody's keys, each row with the bits that it has in the whole sequence.

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

from flowroll.parallel.mesh import Mesh
from flowroll.parallel.shards import Shard

_DISPATCH = "dispatch_attention_fn"
_FEW = 3
_SMALLEST_BLOCK = 32


def with_dispatch(processor: Any, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Any:
    """A processor that runs the code of `processor`, with its attention dispatch wrapped.

    diffusers' processors project, normalise and rotate queries, keys and values, and hand them to the one function
    `dispatch_attention_fn`. Everything around that call is the model's own business and stays the model's own code.

    Args:
        processor: A diffusers attention processor.
        wrap: Makes the dispatch to use from the processor's own.

    Raises:
        LookupError: The processor does not dispatch that way.
    """
    own = type(processor).__call__
    dispatch = own.__globals__.get(_DISPATCH)
    if dispatch is None or _DISPATCH not in own.__code__.co_names:
        raise LookupError(f"{type(processor).__name__} does not call {_DISPATCH}")
    scope = {**own.__globals__, _DISPATCH: wrap(dispatch)}
    call = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    call.__kwdefaults__ = own.__kwdefaults__
    copy: Any = object.__new__(type(f"Gathering{type(processor).__name__}", (type(processor),), {"__call__": call}))
    copy.__dict__.update(processor.__dict__)
    return copy


def gather_keys(
    mesh: Mesh,
    rows: Shard,
    key: Float[Tensor, "batch keys heads channels"],
    value: Float[Tensor, "batch keys heads channels"],
) -> tuple[Float[Tensor, "batch all_keys heads channels"], Float[Tensor, "batch all_keys heads channels"]]:
    """Keys and values of the whole sequence, in its own order, in one collective.

    Args:
        mesh: The ranks.
        rows: Which rows are this rank's. What stands before them is the same on every rank and stays in front.
        key: This rank's.
        value: This rank's.
    """
    prefix = key.shape[1] - rows.size
    # Side by side behind the batch, which stays in front: samples of a shared forward are told apart by that.
    pair = torch.stack((key[:, prefix:], value[:, prefix:]), dim=1)
    keys, values = mesh.gather(pair, axis="sp", dim=2, sizes=rows.sizes).unbind(1)
    if prefix:
        return torch.cat((key[:, :prefix], keys), dim=1), torch.cat((value[:, :prefix], values), dim=1)
    return keys, values


def widen_mask(mask: Tensor, rows: Shard, keys: int) -> Tensor:
    """A mask over the keys of the whole sequence, where it covers this rank's only: the rows inside a region are never padding.

    Args:
        mask: [..., width], boolean.
        rows: Which rows are this rank's.
        keys: Keys of the whole sequence.
    """
    if mask.shape[-1] == keys:
        return mask
    front = mask[..., : mask.shape[-1] - rows.size]
    return torch.cat((front, mask.new_ones((*mask.shape[:-1], rows.total))), dim=-1)


def attend_own_rows(
    dispatch: Callable[..., Tensor],
    query: Float[Tensor, "batch queries heads channels"],
    key: Float[Tensor, "batch keys heads channels"],
    value: Float[Tensor, "batch keys heads channels"],
    rows: Shard,
    **options: Any,
) -> Float[Tensor, "batch queries heads channels"]:
    """Attention of this rank's queries, each with the bits it has on one rank.

    Args:
        dispatch: The model's attention; its mask, if there is one, is the same for all queries.
        query: What is before this rank's rows, the same on every rank, and these rows.
        key: Of the whole sequence.
        value: Of the whole sequence.
        rows: Which rows are this rank's.
        **options: Further arguments of `dispatch`.
    """
    if query.device.type != "cpu":
        return dispatch(query, key, value, **options)
    # Of self-attention: there are as many queries as keys.
    end = _few_rows(key.shape[1]) if rows.is_last else 0
    split = query.shape[1] - end
    padded = next(length for length in itertools.count(split) if not _few_rows(length))
    # Rows that are there anyway fill the block up.
    body = torch.cat((query[:, :split], query[:, : padded - split]), dim=1) if padded > split else query[:, :split]
    attended = dispatch(body, key, value, **options)[:, :split]
    if end:
        # Behind a whole block, as there: the same few rows alone are yet another case.
        tail = dispatch(query[:, split - _SMALLEST_BLOCK :], key, value, **options)[:, _SMALLEST_BLOCK:]
        attended = torch.cat((attended, tail), dim=1)
    return attended


def _few_rows(num_queries: int) -> int:
    """Rows of the last block of queries, if it is one that other kernels compute; else 0."""
    block = 256 if num_queries >= 768 else 64 if num_queries >= 192 else _SMALLEST_BLOCK
    last = num_queries % block
    return last if last <= _FEW else 0
