"""The LoRA adapter that SGLang's trainers push as plain factors, in SGLang's mode "lora_merge".

A bucket holds both factors of some layers, as `<layer>.lora_A` and `<layer>.lora_B`. They replace the factors of the same
layers; other layers keep theirs. The rank is that of the factors, and alpha is one number for all layers of a bucket, or the
rank of each layer.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowroll.engine.weights.staged import listed
from flowroll.errors import WeightsRejectedError

# Requests that name no adapter run with the adapter of this name, if it is loaded.
PUSHED_ADAPTER = "lora_merge"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<factor>lora_[AB])(?:\.[^.]+)?(?:\.weight)?")
_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """The adapter of one linear, which adds alpha / rank x up x down to its weight.

    Attributes:
        down: The factor lora_A, of shape [rank, in_features].
        up: The factor lora_B, of shape [out_features, rank].
        alpha: The numerator of the scale alpha / rank.
    """

    down: Tensor
    up: Tensor
    alpha: int | float

    @property
    def rank(self) -> int:
        """The rank: the number of rows of `down`."""
        return int(self.down.shape[0])


def factor_names(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns, for each name, its layer and "lora_A" or "lora_B".

    Raises:
        WeightsRejectedError: There are no names, a name is not that of a factor, a factor comes twice, or a layer has only one.
    """
    if not names:
        raise refused("must hold both factors of a layer, got nothing")
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise refused(f"must name <layer>.lora_A and <layer>.lora_B alone, got {name[:200]}", "send the adapter's factors")
        found[name] = match["layer"], match["factor"]
    counts = Counter(found.values())
    if len(counts) < len(names):
        raise refused(f"must hold each factor once, got {listed(['.'.join(key) for key in counts if counts[key] > 1])} twice")
    layers = {layer for layer, _ in counts}
    if lacking := [layer for layer in layers if (layer, "lora_A") not in counts or (layer, "lora_B") not in counts]:
        raise refused(f"must hold both factors of every layer, got one for {listed(lacking)}")
    return found


def read_factors(tensors: Mapping[str, Tensor], alpha: int | float | None, rank: int | None) -> dict[str, LoraFactors]:
    """Returns the factors by layer.

    Args:
        tensors: The factors, by the names that were sent.
        alpha: The alpha of all layers; None: the rank of each layer.
        rank: The rank that the sender gave, or None. The rank of the factors is used, as in SGLang; a difference is logged.

    Raises:
        WeightsRejectedError: The names are wrong, the factors of a layer do not fit each other, or have another dtype.
    """
    places = {place: tensors[name] for name, place in factor_names(list(tensors)).items()}
    found = {}
    for layer in dict.fromkeys(layer for layer, _ in places):
        down, up = places[layer, "lora_A"], places[layer, "lora_B"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            shapes = f"{list(down.shape)[:8]} and {list(up.shape)[:8]}"
            raise refused(f"must hold factors [rank, in] and [out, rank] of {layer[:200]}, got {shapes}")
        if odd := [str(factor.dtype) for factor in (down, up) if factor.dtype not in _DTYPES]:
            raise refused(f"must hold float32, float16 or bfloat16 factors of {layer[:200]}, got {odd[0]}")
        if rank not in (None, down.shape[0]):
            _log.warning("the factors of %s are of rank %d, the request says %d; theirs counts", layer, down.shape[0], rank)
        found[layer] = LoraFactors(down=down, up=up, alpha=down.shape[0] if alpha is None else alpha)
    return found


def as_peft(factors: Mapping[str, LoraFactors]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the configuration from which peft makes this adapter."""
    rank = Counter(one.rank for one in factors.values()).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in factors.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        # peft matches a key with the end of a layer's name, unless the key is anchored at the beginning.
        "rank_pattern": {f"^{re.escape(layer)}": one.rank for layer, one in factors.items() if one.rank != rank},
        "alpha_pattern": {f"^{re.escape(layer)}": one.alpha for layer, one in factors.items() if one.alpha != alpha},
    }
    tensors: dict[str, Tensor] = {}
    for layer, one in factors.items():
        tensors |= {f"{layer}.lora_A.weight": one.down, f"{layer}.lora_B.weight": one.up}
    return tensors, config


def refused(what: str, remedy: str = "send the adapter of the model that is served") -> WeightsRejectedError:
    """Makes the error for pushed factors that are refused."""
    return WeightsRejectedError(f"a pushed adapter {what}; {remedy}.", field="serialized_named_tensors")
