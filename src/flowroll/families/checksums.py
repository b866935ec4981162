"""Sums over a module's weights by which a trainer and an engine tell whether they have the same. torch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def weights_checksum(module: nn.Module) -> str:
    """sha256 over a module's weights, as an engine that has the same ones answers."""
    return checksum_of(sorted(module.state_dict().items()))


def tensor_checksums(module: nn.Module) -> dict[str, str]:
    """sha256 of each of a module's tensors by name, for an engine to compare with its own."""
    return {name: tensor_checksum(tensor) for name, tensor in module.state_dict().items()}


def tensor_checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's raw bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    digest.update(_raw(tensor))
    return digest.hexdigest()


def checksum_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over all tensors, as hexadecimal digits: of each its name in UTF-8, then its raw bytes.

    Args:
        named: In the order of the names, e.g. `sorted(module.state_dict().items())`. Consumed one at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; on the CPU without a copy."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
