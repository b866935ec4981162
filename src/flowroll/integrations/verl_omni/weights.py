"""New weights on their way from a trainer's process to an engine: their names, and buckets that Ray carries without copies.

It needs neither verl nor Ray.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowroll.errors import WeightsRejectedError
from flowroll.types.tensors import plain_tensor

# What verl-omni puts in front of every name, what peft does, and the name of a layer under peft's.
_PREFIXES = ("transformer.", "base_model.model.")
_BASE_LAYER = ".base_layer."
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """A tensor as bytes, which pickle takes out of band.

    Attributes:
        name: Its name in the transformer.
        dtype: Its dtype, e.g. "bfloat16".
        shape: Its shape.
        data: Its bytes, as a one-dimensional array of numpy's uint8.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


def module_name(name: str) -> str:
    """Returns the name that a tensor of the trainer has in the transformer's state_dict."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(_BASE_LAYER, ".")


def pack(name: str, tensor: Tensor) -> PackedTensor:
    """Copies a tensor to the host, and returns it as bytes. A DTensor is gathered, which every rank of its mesh has to do.

    Raises:
        WeightsRejectedError: Its dtype is none that weights have.
    """
    whole = plain_tensor(tensor.detach(), name).contiguous()
    dtype = str(whole.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise WeightsRejectedError(
            f"{name[:200]} must be of {', '.join(_DTYPES)}, got {dtype}; send the weights as the trainer holds them."
        )
    data = whole.reshape(-1).view(torch.uint8).numpy()
    return PackedTensor(name=name, dtype=dtype, shape=tuple(whole.shape), data=data)


def unpack(packed: PackedTensor) -> Tensor:
    """Returns a copy of the tensor.

    Raises:
        WeightsRejectedError: Its bytes are not those of its shape and dtype.
    """
    dtype = _DTYPES.get(packed.dtype)
    if dtype is None or math.prod(packed.shape) * dtype.itemsize != packed.data.size:
        raise WeightsRejectedError(
            f"{packed.name[:200]} must be {list(packed.shape)[:8]} of {packed.dtype}, got {packed.data.size} bytes; "
            "send it again."
        )
    # Copied, since what Ray has in shared memory is not to be written to.
    return torch.from_numpy(packed.data.copy()).view(dtype).reshape(packed.shape)


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the factors of an adapter by the names that peft saves them under.

    Raises:
        WeightsRejectedError: A tensor is no factor of an adapter.
    """
    found = {}
    for name, tensor in tensors.items():
        if "lora_" not in name:
            raise WeightsRejectedError(
                f"{name[:200]} must be a factor of an adapter, got another weight; send the base model's weights apart."
            )
        found[f"base_model.model.{module_name(name)}"] = tensor
    return found


def base_tensors(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Returns weights by their names in the transformer, without the factors of adapters among them."""
    return [(module_name(name), tensor) for name, tensor in tensors if ".lora_" not in name]


async def send_weights(
    server: Any,
    weights: Iterator[tuple[str, Tensor]] | AsyncIterator[tuple[str, Tensor]],
    *,
    max_bytes: int,
    **announced: Any,
) -> None:
    """Sends weights to a server in buckets. All are taken from the iterator, whatever happens: other ranks gather with it.

    Args:
        server: The handle of the server's actor; None: another rank sends, and these are dropped.
        weights: The named tensors.
        max_bytes: The most bytes of a bucket, but for a tensor that is larger by itself.
        **announced: What the server is told of the update; see `RolloutServer.begin_weights`.

    Raises:
        Exception: The server refused the weights, and keeps those that it has, or it could not be reached. It is raised after
            the last tensor.
    """
    fault: Exception | None = None
    update: int | None = None
    bucket: list[PackedTensor] = []
    size = 0
    if server is not None:
        try:
            update = await server.begin_weights.remote(**announced)
        except Exception as error:
            fault = error
    async for name, tensor in _each(weights):
        if server is None or fault is not None:
            continue
        try:
            packed = pack(name, tensor)
            if bucket and size + packed.data.size > max_bytes:
                await server.put_weights.remote(update, bucket)
                bucket, size = [], 0
            bucket.append(packed)
            size += packed.data.size
        except Exception as error:
            fault, bucket = error, []
    if server is None:
        return
    try:
        if fault is not None:
            raise fault
        await server.put_weights.remote(update, bucket)
        await server.commit_weights.remote(update)
    except Exception:
        if update is not None:
            await server.drop_weights.remote(update)
        raise


async def _each(weights: Any) -> AsyncIterator[tuple[str, Tensor]]:
    if hasattr(weights, "__aiter__"):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair
