"""Digests of guidance branches, which distinguish an environment that was altered or mixed up from other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from flowroll.types.results import DenoisingEnv, EnvValue
from flowroll.types.tensors import plain_tensor, tensor_bytes


def env_digests(env: DenoisingEnv) -> tuple[str, str | None]:
    """Returns `branch_digest` of the conditional branch, and of the unconditional one if there is one.

    Both branches share the arguments of reference images and the guidance embedding, which count as part of each.
    """
    shared: dict[str, EnvValue] = {f"image_kwargs.{key}": value for key, value in env.image_kwargs.items()}
    if env.guidance is not None:
        shared["guidance"] = env.guidance
    negative = env.neg_cond_kwargs
    return (
        branch_digest({**env.pos_cond_kwargs, **shared}),
        None if negative is None else branch_digest({**negative, **shared}),
    )


def branch_digest(branch: Mapping[str, EnvValue]) -> str:
    """Returns the SHA-256 over one branch's arguments by name: the name, then dtype, shape and bytes, or plain JSON.

    It depends on the values only, not on the device or on how the branch was sent.
    """
    digest = hashlib.sha256()
    for name in sorted(branch):
        value = branch[name]
        if isinstance(value, Tensor):
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        else:
            digest.update(json.dumps([name, value], default=lambda tensor: [str(tensor.dtype), list(tensor.shape)]).encode())
        for tensor in _nested(value):
            digest.update(tensor_bytes(plain_tensor(tensor, name)))
    return digest.hexdigest()


def _nested(value: EnvValue) -> list[Tensor]:
    """Returns the tensors inside nested lists, in their order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _nested(item)] if isinstance(value, list | tuple) else []
