"""One number for a guidance branch, so that an environment that was altered or mixed up can be told from other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from flowroll.types.results import EnvValue
from flowroll.types.tensors import plain_tensor, tensor_bytes


def branch_digest(branch: Mapping[str, EnvValue]) -> str:
    """SHA-256 over the arguments of one branch in the order of their names: name, dtype, shape and bytes, or plain JSON.

    It depends on the values alone: neither on the device, nor on how the branch has travelled.
    """
    digest = hashlib.sha256()
    for name in sorted(branch):
        value = branch[name]
        if isinstance(value, Tensor):
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            digest.update(tensor_bytes(plain_tensor(value, name)))
        else:
            digest.update(json.dumps([name, value]).encode())
    return digest.hexdigest()
