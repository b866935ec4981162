"""Checksums over a module's weights, by which a trainer and an engine compare their weights. It needs torch only.

Weights that are sharded over ranks (DTensors, as FSDP2 makes them) are gathered one at a time, so every rank has to call these
functions; every rank gets the same checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowroll.types.tensors import plain_tensor, tensor_bytes


def weights_checksum(module: nn.Module) -> str:
    """Returns the sha256 over a module's weights, equal to that of an engine with the same weights.

    If the module is sharded, every rank has to call this.

    Raises:
        InvalidRequestError: A weight has no readable data, e.g. on the meta device; the message names it.
    """
    return checksum_of(sorted(module.state_dict(keep_vars=True).items()))


def tensor_checksums(module: nn.Module) -> dict[str, str]:
    """Returns the sha256 of each tensor of a module by its name, which an engine can compare with its own.

    If the module is sharded, every rank has to call this.

    Raises:
        InvalidRequestError: A weight has no readable data, e.g. on the meta device; the message names it.
    """
    return {name: tensor_checksum(tensor, name) for name, tensor in module.state_dict(keep_vars=True).items()}


def adapter_checksum(module: nn.Module, adapter: str = "default") -> str:
    """Returns the sha256 over a LoRA adapter that peft has put on a module, equal to that of an engine that has loaded it.

    It covers the names of the tensors, without peft's prefix and the adapter's name, their bytes, and each layer's scale.

    Args:
        module: A peft model, or a model with peft's layers in it.
        adapter: The adapter's name in the module.
    """
    return layers_checksum(module.named_modules(), adapter)


def layers_checksum(named: Iterable[tuple[str, nn.Module]], adapter: str) -> str:
    """Returns `adapter_checksum` for modules given by their paths; modules without the adapter are left out."""
    return checksum_of(sorted(_adapter_tensors(named, adapter), key=lambda tensor: tensor[0]))


def _adapter_tensors(named: Iterable[tuple[str, nn.Module]], adapter: str) -> Iterator[tuple[str, Tensor]]:
    # These are the attributes of peft's layers, read without importing peft.
    for path, layer in named:
        factors: Any = getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
        if adapter not in factors[0]:
            continue
        path = path.removeprefix("base_model.model.")
        for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
            yield f"{path}.{name}.weight", factor[adapter].weight
        scale: Any = layer.scaling
        yield f"{path}.scaling", torch.tensor(scale[adapter], dtype=torch.float64)


def tensor_checksum(tensor: Tensor, name: str = "the tensor") -> str:
    """Returns the sha256 of a tensor's raw bytes in row-major order, as hexadecimal digits.

    Args:
        tensor: Any tensor; a DTensor is gathered, see `types.tensors.plain_tensor`.
        name: The tensor's name in an error message.

    Raises:
        InvalidRequestError: The tensor has no readable data.
    """
    return hashlib.sha256(tensor_bytes(plain_tensor(tensor, name))).hexdigest()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Returns the sha256 over the bytes of contiguous tensors, one after the other, as hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor.cpu()))
    return digest.hexdigest()


def typed_tensor_checksum(tensor: Tensor) -> str:
    """Returns the sha256 of a tensor's dtype, shape and raw bytes, as SGLang's checker of updates computes it.

    It covers `str(dtype)`, then `repr(tuple(shape))`, then the bytes.
    """
    plain = plain_tensor(tensor)
    digest = hashlib.sha256(typed_prefix(plain))
    digest.update(tensor_bytes(plain))
    return digest.hexdigest()


def typed_prefix(tensor: Tensor) -> bytes:
    """Returns what `typed_tensor_checksum` covers before the bytes of a tensor."""
    return f"{tensor.dtype}{tuple(tensor.shape)!r}".encode()


def checksum_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the sha256, as hexadecimal digits, over the name in UTF-8 and then the raw bytes of each tensor.

    Args:
        named: Names and tensors in the order of the names, e.g. `sorted(module.state_dict().items())`, read one at a time.

    Raises:
        InvalidRequestError: A tensor has no readable data.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor_bytes(plain_tensor(tensor, name)))
    return digest.hexdigest()
