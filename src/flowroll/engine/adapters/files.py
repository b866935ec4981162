"""LoRA adapters as peft saves them: adapter_config.json beside adapter_model.safetensors, found and read.

What the configuration means is adapter_config.py's.
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
    (folder / _CONFIG).write_text(adapter_config_text(config))


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


def refused(message: str) -> WeightsRejectedError:
    """What the caller is told of an adapter that cannot be taken."""
    return WeightsRejectedError(message, field="lora_path")


def unreadable(error: Exception) -> WeightsRejectedError:
    """The same, of an error of the disk, the libraries or the file's content."""
    if isinstance(error, CheckpointError):
        return refused(error.message)
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return refused(f"an adapter must be read to its end, got {type(error).__name__}: {reason}; ask again.")
