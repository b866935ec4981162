"""Rollouts on disk: one sample, one safetensors file.

The tensors are ordinary safetensors entries, named by their path in the answer (`dit_trajectory.latents`); everything else
is one JSON text in the file's metadata, in the native layout of an answer, where `{"__tensor__": NAME}` stands for a tensor.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowroll.errors import RolloutFileError
from flowroll.types import SCHEMA_VERSION, Rollout
from flowroll.types.tensors import plain_tensor, tensor_bytes
from flowroll.wire.dialects import rollout_from_wire, rollout_to_wire
from flowroll.wire.messages import WireSample
from flowroll.wire.safetensors import safetensors_prefix

_CONTENT_KEY = "flowroll.rollout"
_VERSION_KEY = "flowroll.schema_version"


class _TensorName(msgspec.Struct, frozen=True):
    """The name that stands for a tensor of the file."""

    name: str = msgspec.field(name="__tensor__")


_CONTENT = msgspec.json.Decoder(WireSample[_TensorName])


def save_rollout(path: str | Path, rollout: Rollout) -> None:
    """Writes a rollout to a file, whole or not at all: a file of that name is replaced only when the new one is complete.

    Raises:
        RolloutFileError: The file cannot be written there.
    """
    target = Path(path)
    found: dict[str, Tensor] = {}
    content = _without_tensors(rollout_to_wire(rollout, "native"), "", found)
    # Widest dtype first, as safetensors itself does, so that every tensor is aligned.
    names = sorted(found, key=lambda name: (-found[name].element_size(), name))
    tensors = {name: plain_tensor(found[name], name) for name in names}
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION), _CONTENT_KEY: msgspec.json.encode(content).decode()}
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with open(unfinished, "xb") as file:
            file.write(safetensors_prefix(tensors, metadata=metadata))
            for tensor in tensors.values():
                file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        raise RolloutFileError(
            f"path must be writable, got {target} ({error.strerror}); make the folder, or free some space."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_rollout(path: str | Path) -> Rollout:
    """Reads the rollout in a file, with every tensor bit for bit.

    Raises:
        RolloutFileError: The file is missing, truncated, not a rollout, or of another schema version.
    """
    source = Path(path)
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(source, metadata)
            sample = _CONTENT.decode(metadata[_CONTENT_KEY])
            return rollout_from_wire(sample, lambda leaf: _tensor(file, leaf.name))
    except OSError as error:
        raise RolloutFileError(f"path must be a readable rollout file, got {source} ({error}); check the name.") from error
    except (SafetensorError, msgspec.DecodeError, ValueError, KeyError, RecursionError, AssertionError) as error:
        raise RolloutFileError(
            f"path must be a whole rollout file, got {source} ({error}); it is damaged or foreign, save the rollout again."
        ) from error


def _check_version(source: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get(_VERSION_KEY)
    if version is None:
        raise RolloutFileError(
            f"path must be a rollout file, got {source}, which has no {_VERSION_KEY}; use a file that save_rollout wrote."
        )
    if version != str(SCHEMA_VERSION):
        raise RolloutFileError(
            f"{_VERSION_KEY} must be {SCHEMA_VERSION}, got {version} in {source}; read it with the flowroll that wrote it."
        )


def _tensor(file: Any, name: str) -> Tensor:
    # A clone: `get_tensor` gives a window on the mapped file, which would change with a file that is rewritten in place.
    tensor: Tensor = file.get_tensor(name)
    return tensor.clone()


def _without_tensors(value: object, name: str, found: dict[str, Tensor]) -> object:
    """Returns the value with each tensor, at any depth, replaced by its name and added to `found`."""
    if isinstance(value, Tensor):
        found[name] = value
        return _TensorName(name=name)
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, f"{name}.{key}".lstrip("."), found) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_tensors(item, f"{name}.{index}", found) for index, item in enumerate(value)]
    return value
