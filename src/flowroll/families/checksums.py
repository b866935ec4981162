"""Sums over a module's weights by which a trainer and an engine tell whether they have the same. torch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's raw bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    digest.update(_raw(tensor))
    return digest.hexdigest()


def weights_checksum(named: Iterable[tuple[str, Tensor]]) -> str:
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
