"""Random weights that keep a model's signals at order one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import nn

_BIAS_STD = 0.1
# Tables whose rows are used as they are, not multiplied: unit rows.
_ROW_TABLES = ("embed_tokens", "pad_token")


def fill_random(module: nn.Module, seed: int, gains: Mapping[str, float] | None = None) -> None:
    """Draws every weight and bias of a freshly built module again, from its own generator.

    A weight has std gain / sqrt(fan_in), so that a unit input gives an output of about `gain`; scales of norms stay 1. Each
    parameter's generator is keyed by (seed, its name): a deeper model begins with the same weights.

    Args:
        module: Changed in place, float32.
        seed: Same seed, same weights.
        gains: Gain by the beginning of a parameter's name, 1 elsewhere.
    """
    gains = gains or {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if std := _std(module, name, parameter):
                gain = next((value for prefix, value in gains.items() if name.startswith(prefix)), 1.0)
                # CPU generators use the low 32 bits of a seed, so both have to be in there.
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (gain * std))


def _std(module: nn.Module, name: str, parameter: nn.Parameter) -> float:
    """Standard deviation at gain 1; 0 for a norm's scale, which keeps the value it was built with."""
    if any(table in name for table in _ROW_TABLES):
        return 1.0
    if name.endswith("bias"):
        return _BIAS_STD
    if name.endswith("gamma") or parameter.ndim == 1:
        return 0.0
    return 1.0 / math.sqrt(parameter[0].numel())
