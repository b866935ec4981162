"""LoRA adapters as peft saves them, read and checked: adapter_config.json beside adapter_model.safetensors.

What is refused is what the engine would compute otherwise than the trainer: kinds of adapters beyond plain LoRA on linears,
options that this peft does not know, and starting values that change the weights below.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowroll.engine.adapter_patterns import check_patterns
from flowroll.engine.tensorfile import StoredTensor, TensorFile
from flowroll.engine.weight_files import read_json
from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.types.tensors import plain_tensor

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CONFIG_KEY = "adapter_config"
_PREFIX = "base_model.model."
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What decides which layers there are, of which rank and scale.
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
# What has no effect on a finished adapter.
_IDLE = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "init_lora_weights",
    }
)
# Starting values that leave the weights below as they are; others are no adapter for the model that is served.
_STARTS = (True, False, "gaussian", "orthogonal")
_MAX_RANK, _MAX_ALPHA = 4096, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """Where an adapter is; nothing is read yet.

    Attributes:
        folder: That was named, symbolic links resolved.
        config: Its configuration.
        weights: Its tensors.
    """

    folder: Path
    config: Path
    weights: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterData:
    """An adapter as it was read.

    Attributes:
        config: The configuration's object.
        tensors: By their names without peft's prefix, in the dtypes that they have in the file.
        seconds: That reading took.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    seconds: float


def find_adapter(source: str | Path) -> AdapterFiles:
    """The files of an adapter's folder.

    Raises:
        WeightsRejectedError: They are not there.
    """
    try:
        folder = Path(source).resolve()
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                # Named where it is the likely reason: pickles are not read.
                got = "adapter_model.bin" if name == _WEIGHTS and (folder / "adapter_model.bin").exists() else "none"
                raise refused(f"{folder} must hold {name}, got {got}; save the adapter with peft's save_pretrained.")
        return AdapterFiles(folder=folder, config=(folder / _CONFIG).resolve(), weights=(folder / _WEIGHTS).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # the last two: no path at all, a loop of links
        raise unreadable(error) from error


def unpack_config(weights: Path) -> None:
    """Puts the configuration that a file of tensors carries in its metadata, as `adapter_config`, beside it.

    Raises:
        WeightsRejectedError: It carries none, or is no safetensors file.
    """
    try:
        with safe_open(weights, framework="pt") as file:
            config = (file.metadata() or {})[_CONFIG_KEY]
        (weights.parent / _CONFIG).write_text(config)
    except KeyError:
        raise refused(
            f"the body must carry {_CONFIG_KEY} in its metadata, got none; send adapter_config.json as that."
        ) from None
    except (SafetensorError, OSError, UnicodeError) as error:
        raise unreadable(error) from error


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Saves an adapter as peft does."""
    # Clones, because safetensors refuses tensors that share memory.
    copies = {name: plain_tensor(tensor, name).clone() for name, tensor in tensors.items()}
    save_file(copies, folder / _WEIGHTS)
    # peft's own object has sets in it.
    (folder / _CONFIG).write_text(json.dumps(dict(config), default=sorted))


def read_adapter(files: AdapterFiles, *, max_bytes: int) -> AdapterData:
    """Reads an adapter into memory of its own.

    Raises:
        WeightsRejectedError: It cannot be read to its end, is larger, or holds what is no tensor of an adapter.
    """
    started_s = time.perf_counter()
    try:
        config = read_json(files.config, f"{files.config} must be readable")
        with TensorFile(files.weights) as file:
            total = sum(tensor.stop - tensor.start for tensor in file.stored)
            if total > max_bytes:
                raise refused(
                    f"{files.weights} must have at most {max_bytes} bytes of tensors, got {total}; lower the rank, or start "
                    "the engine with a higher limit."
                )
            tensors = {tensor.name: _read_tensor(tensor, file) for tensor in file.stored}
            file.check_unchanged()
    except (CheckpointError, OSError, MemoryError, RuntimeError) as error:
        raise unreadable(error) from error
    return AdapterData(config=config, tensors=_without_prefix(tensors), seconds=time.perf_counter() - started_s)


def _read_tensor(tensor: StoredTensor, file: TensorFile) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise refused(
            f"{tensor.name[:200]} must be in one of {', '.join(_FLOATS)}, got {tensor.dtype}; save it in one of these."
        )
    stored = torch.empty(tensor.shape, dtype=_FLOATS[tensor.dtype])
    file.read_into(stored, tensor.start)
    return stored


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if len(found) != len(tensors):
        raise refused("an adapter must hold every tensor once, got some with and without peft's prefix; save it again.")
    return found


def lora_config(config: Mapping[str, Any]) -> Any:
    """The `LoraConfig` of an adapter's configuration, as it is when the adapter is used.

    Raises:
        WeightsRejectedError: It is not of plain LoRA, or a value breaks its rule.
    """
    peft = load_peft()
    if config.get("peft_type") != "LORA":
        raise refused(f"peft_type must be LORA, got {_shown(config.get('peft_type'))}; load a LoRA adapter.")
    usual = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=str))
    for key, value in config.items():
        if key in _SHAPING or key in _IDLE:
            continue
        # What this peft does not know is as good as absent where it is off.
        if value != usual[key] if key in usual else value not in (None, False, {}, []):
            rule = f"be {_shown(usual[key])}" if key in usual else "be known to the engine's peft"
            raise refused(f"{str(key)[:80]} must {rule}, got {_shown(value)}; train a plain LoRA adapter of linears.")
    if config.get("init_lora_weights", True) not in _STARTS:
        shown = _shown(config["init_lora_weights"])
        raise refused(f"init_lora_weights must leave the model's weights as they are, got {shown}; use true or gaussian.")
    _check_numbers(config)
    check_patterns(config)
    chosen = {key: config[key] for key in _SHAPING if config.get(key) is not None}
    return peft.LoraConfig(**chosen, lora_dropout=0.0, init_lora_weights=False)


def shape_key(config: Mapping[str, Any]) -> str:
    """Adapters with equal keys have the same layers."""
    return json.dumps({key: config.get(key) for key in _SHAPING}, sort_keys=True)


def _check_numbers(config: Mapping[str, Any]) -> None:
    ranks, scales = _pattern(config, "rank_pattern"), _pattern(config, "alpha_pattern")
    for rank in (config.get("r", 8), *ranks.values()):
        if not (type(rank) is int and 1 <= rank <= _MAX_RANK):
            raise refused(f"r must be an integer from 1 to {_MAX_RANK}, got {_shown(rank)}; save the adapter again.")
    for scale in (config.get("lora_alpha", 8), *scales.values()):
        # Compared, not converted: an integer may be beyond all floats.
        if not (type(scale) in (int, float) and abs(scale) <= _MAX_ALPHA):
            raise refused(
                f"lora_alpha must be a finite number of at most {_MAX_ALPHA:g}, got {_shown(scale)}; save the adapter again."
            )
    if not isinstance(config.get("use_rslora", False), bool):
        raise refused(f"use_rslora must be true or false, got {_shown(config['use_rslora'])}; save the adapter again.")
    targets = config.get("target_modules")
    if not (targets and (isinstance(targets, str) or _are_texts(targets))):
        raise refused(f"target_modules must name linears, got {_shown(targets)}; save the adapter again.")


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise refused(f"{key} must be an object, got {_shown(pattern)}; save the adapter again.")
    return pattern


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def load_peft() -> Any:
    """The library, which only those need who use adapters.

    Raises:
        WeightsRejectedError: It is not there.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise refused("peft must be installed to load adapters, got none; pip install 'flowroll[lora]'.") from error


def refused(message: str) -> WeightsRejectedError:
    """What the caller is told of an adapter that cannot be taken."""
    return WeightsRejectedError(message, field="lora_path")


def unreadable(error: Exception) -> WeightsRejectedError:
    """The same, of an error of the disk, the libraries or the file's content."""
    if isinstance(error, CheckpointError):
        return refused(error.message)
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return refused(f"an adapter must be read to its end, got {type(error).__name__}: {reason}; ask again.")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
