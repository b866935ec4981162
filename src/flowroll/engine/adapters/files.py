"""Finds, reads and writes LoRA adapters as peft saves them: adapter_config.json beside adapter_model.safetensors.

adapters/config.py interprets the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowroll.engine.weights.files import read_json
from flowroll.engine.weights.tensorfile import TensorFile
from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.types import adapter_config_text
from flowroll.types.tensors import plain_tensor
from flowroll.wire.safetensors import StoredTensor

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CONFIG_KEY = "adapter_config"
_PREFIX = "base_model.model."
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """The files of an adapter; nothing is read yet.

    Attributes:
        folder: The adapter's folder, with symbolic links resolved.
        config: The file of its configuration.
        weights: The safetensors file of its tensors.
    """

    folder: Path
    config: Path
    weights: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterData:
    """An adapter as it was read from its files.

    Attributes:
        config: The JSON object of the configuration.
        tensors: The tensors by their names without peft's prefix, in the dtypes that they have in the file.
        seconds: How long reading took, in seconds.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    seconds: float


def find_adapter(source: str | Path) -> AdapterFiles:
    """Finds the files of an adapter's folder.

    Raises:
        WeightsRejectedError: The files are not there.
    """
    try:
        folder = Path(source).resolve()
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                # The message names adapter_model.bin if it exists, because it is the likely reason: pickles are not read.
                got = "adapter_model.bin" if name == _WEIGHTS and (folder / "adapter_model.bin").exists() else "none"
                raise refused(f"{folder} must hold {name}, got {got}; save the adapter with peft's save_pretrained.")
        return AdapterFiles(folder=folder, config=(folder / _CONFIG).resolve(), weights=(folder / _WEIGHTS).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # the last two: an invalid path, a loop of links
        raise unreadable(error) from error


def unpack_config(weights: Path) -> None:
    """Writes the configuration that a safetensors file has in its metadata, as `adapter_config`, to a file beside it.

    Raises:
        WeightsRejectedError: The metadata has no configuration, or it is no safetensors file.
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
    """Saves an adapter as peft saves it."""
    # Cloned, because safetensors refuses tensors that share memory.
    copies = {name: plain_tensor(tensor, name).clone() for name, tensor in tensors.items()}
    save_file(copies, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(adapter_config_text(config))


def read_adapter(files: AdapterFiles, *, max_bytes: int) -> AdapterData:
    """Reads an adapter into newly allocated memory.

    Raises:
        WeightsRejectedError: The adapter cannot be read to its end, has more than `max_bytes` bytes of tensors, or holds
            tensors that no adapter has.
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


def refused(message: str) -> WeightsRejectedError:
    """Makes the error for an adapter that is refused."""
    return WeightsRejectedError(message, field="lora_path")


def unreadable(error: Exception) -> WeightsRejectedError:
    """Makes the error for an adapter that the disk, the libraries or the file's content keep from being read."""
    if isinstance(error, CheckpointError):
        return refused(error.message)
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return refused(f"an adapter must be read to its end, got {type(error).__name__}: {reason}; ask again.")
