"""Sums over a module's weights by which a trainer and an engine tell whether they have the same. torch alone.

Weights that are sharded over ranks (DTensors, as FSDP2 makes them) are gathered one at a time, so every rank has to call these
functions; every rank gets the same sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowroll.types.tensors import plain_tensor, tensor_bytes


def weights_checksum(module: nn.Module) -> str:
    """sha256 over a module's weights, as an engine that has the same ones answers. Of a sharded module, on every rank.

    Raises:
        InvalidRequestError: A weight has no data that could be read, e.g. on the meta device; it is named.
    """
    return checksum_of(sorted(module.state_dict(keep_vars=True).items()))


def tensor_checksums(module: nn.Module) -> dict[str, str]:
    """sha256 of each of a module's tensors by name, for an engine to compare with its own. Of a sharded module, on every rank.

    Raises:
        InvalidRequestError: A weight has no data that could be read, e.g. on the meta device; it is named.
    """
    return {name: tensor_checksum(tensor, name) for name, tensor in module.state_dict(keep_vars=True).items()}


def adapter_checksum(module: nn.Module, adapter: str = "default") -> str:
    """sha256 over a LoRA adapter that peft has put on a module, as an engine that has loaded it answers.

    Over the names of its tensors, without peft's prefix and the adapter's name, and their bytes, and over each layer's scale.

    Args:
        module: A peft model, or a model with peft's layers in it.
        adapter: Its name there.
    """
    return layers_checksum(module.named_modules(), adapter)


def layers_checksum(named: Iterable[tuple[str, nn.Module]], adapter: str) -> str:
    """The same over modules by their paths; those without the adapter do not count."""
    return checksum_of(sorted(_adapter_tensors(named, adapter), key=lambda tensor: tensor[0]))


def _adapter_tensors(named: Iterable[tuple[str, nn.Module]], adapter: str) -> Iterator[tuple[str, Tensor]]:
    # Of peft's layers; this package does not need the library.
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
    """sha256 of a tensor's raw bytes in row-major order, as hexadecimal digits.

    Args:
        tensor: Any tensor; a DTensor is gathered, see `types.tensors.plain_tensor`.
        name: What a message calls it.

    Raises:
        InvalidRequestError: It has no data that could be read.
    """
    return hashlib.sha256(tensor_bytes(plain_tensor(tensor, name))).hexdigest()


def typed_tensor_checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and raw bytes, as SGLang's checker of updates makes it.

    Over `str(dtype)`, then `repr(tuple(shape))`, then the bytes.
    """
    digest = hashlib.sha256()
    plain = plain_tensor(tensor)
    digest.update(f"{plain.dtype}{tuple(plain.shape)!r}".encode())
    digest.update(tensor_bytes(plain))
    return digest.hexdigest()


def checksum_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over all tensors, as hexadecimal digits: of each its name in UTF-8, then its raw bytes.

    Args:
        named: In the order of the names, e.g. `sorted(module.state_dict().items())`. Consumed one at a time.

    Raises:
        InvalidRequestError: One has no data that could be read.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor_bytes(plain_tensor(tensor, name)))
    return digest.hexdigest()
