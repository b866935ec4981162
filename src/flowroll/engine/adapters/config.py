"""Interprets an adapter's configuration by its effect on a finished adapter, not by its spelling.

A value that has the same effect as peft's default is treated as the default: an option that is off, however it is written; an
option of training or of peft at run time; a part of an option that is itself off. Refused is whatever the engine would compute
differently than the trainer: kinds of adapters other than plain LoRA on linears, options that the installed peft does not
know, and initial values that change the model's weights.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flowroll.engine.adapters.files import refused
from flowroll.engine.adapters.patterns import check_patterns

# The options that decide which layers there are, and their ranks and scales.
_SHAPING = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
_NUMBERS = ("r", "lora_alpha")
# The options that change nothing in a finished adapter of linears, besides those of `PeftConfig`, which only describe it.
_IDLE = frozenset(
    {
        # Options of training, and of memory at run time.
        "lora_dropout",
        "runtime_config",
        # Options of the initial values; init_lora_weights tells whether these matter.
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        # Parts of options that are refused if they are on.
        "megatron_core",
        "qalora_group_size",
        # Options of layers other than linears, and of linears with shared weights, which no transformer here has.
        "fan_in_fan_out",
        "ensure_weight_tying",
    }
)
# The kinds of initial values that leave the model's weights unchanged; an adapter with others is not for the served model.
_STARTS = (True, "gaussian", "orthogonal", "eva", "mica")
_MAX_RANK, _MAX_ALPHA = 4096, 1e9


def lora_config(config: Mapping[str, Any]) -> Any:
    """Returns peft's `LoraConfig` for an adapter's configuration, as it applies when the adapter is used.

    Raises:
        WeightsRejectedError: The configuration is not of plain LoRA, or a value is invalid.
    """
    peft = load_peft()
    if config.get("peft_type") != "LORA":
        raise refused(f"peft_type must be LORA, got {_shown(config.get('peft_type'))}; load a LoRA adapter.")
    described = {field.name for field in fields(peft.PeftConfig)}
    usual = peft.LoraConfig()
    for key, value in config.items():
        if key in _SHAPING or key in _IDLE or key in described or _is_default(peft.LoraConfig, usual, key, value):
            continue
        rule = f"be {_shown(getattr(usual, key))}" if hasattr(usual, key) else "be known to the engine's peft"
        raise refused(f"{key[:80]} must {rule}, got {_shown(value)}; train a plain LoRA adapter of linears.")
    start = config.get("init_lora_weights")
    if start and (start.lower() if isinstance(start, str) else start) not in _STARTS:
        shown = _shown(start)
        raise refused(f"init_lora_weights must leave the model's weights as they are, got {shown}; use true or gaussian.")
    shaping = _shaping(config)
    _check_numbers(shaping)
    check_patterns(shaping)
    try:
        return peft.LoraConfig(**shaping, lora_dropout=0.0, init_lora_weights=False)
    except (TypeError, ValueError) as error:  # options that exclude each other
        raise refused(f"adapter_config.json must be one that peft takes, got {error}; save the adapter again.") from error


def shape_key(config: Mapping[str, Any]) -> str:
    """Returns a key that is equal for configurations that give the same layers."""
    return json.dumps(_shaping(config), sort_keys=True)


def load_peft() -> Any:
    """Imports peft, which is needed only to use adapters.

    Raises:
        WeightsRejectedError: peft is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise refused("peft must be installed to load adapters, got none; pip install 'flowroll[lora]'.") from error


def _is_default(config_class: Any, usual: Any, key: str, value: object) -> bool:
    """Returns whether a value has the same effect as peft's default."""
    if not value:
        # An empty object may mean an option with all its defaults; peft then makes that option of it.
        return value != {} or not hasattr(usual, key) or not _effective(config_class, key, value)
    return hasattr(usual, key) and value == getattr(usual, key)


def _effective(config_class: Any, key: str, value: object) -> object:
    """Returns what peft makes of a value; a value that is not off if peft does not accept it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(config_class(**{key: value}), key)
    except (TypeError, ValueError, ImportError):
        return key


def _shaping(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that shape the layers, without those that are off."""
    given = {key: config[key] for key in _SHAPING if key in config}
    return {key: value for key, value in given.items() if key in _NUMBERS or not _is_empty(value)}


def _is_empty(value: object) -> bool:
    # Not decided by truth value, because 0 is the index of the first layer.
    return value is None or value is False or value == "" or value == [] or value == {}


def _check_numbers(shaping: Mapping[str, Any]) -> None:
    ranks, scales = _pattern(shaping, "rank_pattern"), _pattern(shaping, "alpha_pattern")
    for rank in (shaping.get("r", 8), *ranks.values()):
        if not (type(rank) is int and 1 <= rank <= _MAX_RANK):
            raise refused(f"r must be an integer from 1 to {_MAX_RANK}, got {_shown(rank)}; save the adapter again.")
    for scale in (shaping.get("lora_alpha", 8), *scales.values()):
        # Compared without conversion, because an integer may be too large for a float.
        if not (type(scale) in (int, float) and abs(scale) <= _MAX_ALPHA):
            raise refused(
                f"lora_alpha must be a finite number of at most {_MAX_ALPHA:g}, got {_shown(scale)}; save the adapter again."
            )
    if not isinstance(shaping.get("use_rslora", False), bool):
        raise refused(f"use_rslora must be true or false, got {_shown(shaping['use_rslora'])}; save the adapter again.")
    targets = shaping.get("target_modules")
    if not (targets and (isinstance(targets, str) or _are_texts(targets))):
        raise refused(f"target_modules must name linears, got {_shown(targets)}; save the adapter again.")


def _pattern(shaping: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = shaping.get(key, {})
    if not isinstance(pattern, dict):
        raise refused(f"{key} must be an object, got {_shown(pattern)}; save the adapter again.")
    return pattern


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
