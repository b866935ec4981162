"""Random weights that keep a model's signals at order one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_BIAS_STD = 0.1
# Tables whose rows are used as they are, not multiplied: unit rows.
_ROW_TABLES = ("embed_tokens", "pad_token")


def fill_random(module: nn.Module, seed: int, gains: Mapping[str, float] | None = None) -> None:
    """Draws every weight and bias of a freshly built module again, from its own generator.

    A weight has std gain / sqrt(fan_in), so that a unit input gives an output of about `gain`; scales of norms stay 1. The
    kernels of convolutions blur, so that a VAE's pictures are clouds and not grain. Each parameter's generator is keyed by
    (seed, its name): a deeper model begins with the same weights.

    Args:
        module: Changed in place, float32.
        seed: Same seed, same weights.
        gains: Gain of the parameters whose name ends so, 1 elsewhere.
    """
    gains = gains or {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not _is_norm_scale(name, parameter):
                # CPU generators use the low 32 bits of a seed, so both have to be in there.
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
                parameter.copy_(gain * _draw(name, parameter, generator))


def align_file(path: Path) -> None:
    """Makes the tensors of a safetensors file begin at a multiple of 64 bytes, by spaces at the end of its header.

    Where they begin is where they lie in the memory of whoever maps the file, and on the CPU the bits of some float32 products
    depend on that. With whole multiples they lie as torch's own memory does.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * (-(8 + length) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _is_norm_scale(name: str, parameter: nn.Parameter) -> bool:
    if any(table in name for table in _ROW_TABLES) or name.endswith("bias"):
        return False
    return name.endswith("gamma") or parameter.ndim == 1


def _draw(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    shape = parameter.shape
    if any(table in name for table in _ROW_TABLES):
        return torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return _BIAS_STD * torch.randn(shape, generator=generator)
    if shape[2:][-2:] == (3, 3):
        channels = torch.randn((*shape[:-2], 1, 1), generator=generator) / math.sqrt(math.prod(shape[1:-2]))
        binomial = torch.tensor([0.25, 0.5, 0.25])
        return channels * binomial[:, None] * binomial
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
