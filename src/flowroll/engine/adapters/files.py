"""Finds, reads and writes LoRA adapters as peft saves them: adapter_config.json beside adapter_model.safetensors.

adapters/config.py interprets the configuration.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowroll.engine.weights.files import parse_json, read_json
from flowroll.engine.weights.tensorfile import TensorFile
from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.parallel.shared_memory import SharedMemory
from flowroll.types import adapter_config_text
from flowroll.types.tensors import plain_tensor, tensor_bytes
from flowroll.wire.safetensors import StoredTensor, safetensors_prefix

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
T = TypeVar("T")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """The files of an adapter; nothing is read yet.

    Attributes:
        places: The file of its configuration, and the safetensors file of its tensors: their paths, or the memory in which they
            lie, which every rank on this machine can open.
    """

    places: tuple[Path, Path] | tuple[SharedMemory, SharedMemory]

    @property
    def config(self) -> Path:
        """A path of the configuration, as long as this process has the files."""
        return _path_of(self.places[0])

    @property
    def weights(self) -> Path:
        """A path of the tensors, as long as this process has the files."""
        return _path_of(self.places[1])

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Gives files without names their usual ones in the errors of the block."""
        try:
            yield
        except WeightsRejectedError as error:
            if isinstance(self.places[0], Path):
                raise
            message = error.message.replace(str(self.config), _CONFIG).replace(str(self.weights), "the body")
            raise WeightsRejectedError(message, field=error.field) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterData:
    """An adapter as it was read from its files.

    Attributes:
        config: The JSON object of the configuration.
        tensors: The tensors by their names without peft's prefix, in the dtypes that they have in the file.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


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
        return AdapterFiles(places=((folder / _CONFIG).resolve(), (folder / _WEIGHTS).resolve()))
    except (OSError, ValueError, RuntimeError) as error:  # the last two: an invalid path, a loop of links
        raise unreadable(error) from error


def files_in_memory(weights: SharedMemory, config: str) -> AdapterFiles:
    """Returns the files of an adapter in memory, which can be sent to another process of this machine.

    Args:
        weights: The memory of a safetensors file, whose size is that of the file.
        config: The text of the configuration.

    Raises:
        WeightsRejectedError: There is not enough memory.
    """
    text = config.encode()
    try:
        copy = SharedMemory.create(len(text))
    except OSError as error:
        raise unreadable(error) from error
    tensor_bytes(copy.bytes)[: len(text)] = text
    return AdapterFiles(places=(copy, weights))


def _path_of(place: Path | SharedMemory) -> Path:
    return place if isinstance(place, Path) else Path(f"/proc/{os.getpid()}/fd/{place.descriptor}")


def adapter_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> AdapterFiles:
    """Returns the files of an adapter that is made of these tensors and this configuration, in memory of this process.

    Raises:
        WeightsRejectedError: A dtype cannot be written, or there is not enough memory.
    """
    plain = {name: plain_tensor(tensor, name).contiguous() for name, tensor in tensors.items()}
    try:
        prefix = safetensors_prefix(plain)
        memory = SharedMemory.create(len(prefix) + sum(tensor.nbytes for tensor in plain.values()))
        view, start = tensor_bytes(memory.bytes), 0
        for data in (memoryview(prefix), *map(tensor_bytes, plain.values())):
            view[start : start + len(data)] = data
            start += len(data)
        return files_in_memory(memory, adapter_config_text(config))
    except (OSError, KeyError) as error:
        raise unreadable(error) from error


def parse_config(text: str) -> Mapping[str, Any]:
    """Parses the text of adapter_config.json.

    Raises:
        WeightsRejectedError: It is too long, or no JSON object.
    """
    try:
        return parse_json(text, _CONFIG)
    except CheckpointError as error:
        raise refused(error.message) from error


def read_adapter(files: AdapterFiles, *, max_bytes: int) -> AdapterData:
    """Reads an adapter into newly allocated memory.

    Raises:
        WeightsRejectedError: The adapter cannot be read to its end, has more than `max_bytes` bytes of tensors, or holds
            tensors that no adapter has.
    """
    try:
        config = read_json(files.config, f"{files.config} must be readable")
        with TensorFile(files.weights) as file:
            check_stored(file.stored, max_bytes, str(files.weights))
            tensors = {tensor.name: _read_tensor(tensor, file) for tensor in file.stored}
            file.check_unchanged()
    except (CheckpointError, OSError, MemoryError, RuntimeError) as error:
        raise unreadable(error) from error
    return AdapterData(config=config, tensors=without_prefix(tensors))


def check_stored(stored: Sequence[StoredTensor], max_bytes: int, subject: str) -> None:
    """Checks the tensors of an adapter by what a header says of them.

    Raises:
        WeightsRejectedError: They have more than `max_bytes` bytes, or are no floats.
    """
    total = sum(tensor.stop - tensor.start for tensor in stored)
    if total > max_bytes:
        raise refused(
            f"{subject} must have at most {max_bytes} bytes of tensors, got {total}; lower the rank, or start the engine with "
            "a higher limit."
        )
    for tensor in stored:
        if tensor.dtype not in _FLOATS:
            raise refused(
                f"{tensor.name[:200]} must be in one of {', '.join(_FLOATS)}, got {tensor.dtype}; save it in one of these."
            )


def _read_tensor(tensor: StoredTensor, file: TensorFile) -> Tensor:
    stored = torch.empty(tensor.shape, dtype=_FLOATS[tensor.dtype])
    file.read_into(stored, tensor.start)
    return stored


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors, or what stands for them, by their names without peft's prefix.

    Raises:
        WeightsRejectedError: A tensor is there twice, with and without the prefix.
    """
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
