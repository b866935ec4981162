"""Rollouts on disk: one sample, one safetensors file.

The tensors are ordinary safetensors entries, named by their path in the answer (`dit_trajectory.latents`); everything else
is one JSON text in the file's metadata, in the native layout of an answer, where `{"__tensor__": NAME}` stands for a tensor.
A store's shards (`flowroll.store`) hold several samples in the same form, each under a prefix of its own.

Files are read forwards: this flowroll reads the schema versions up to its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowroll.errors import RolloutFileError
from flowroll.types import SCHEMA_VERSION, Rollout, is_readable_version
from flowroll.types.tensors import plain_tensor, tensor_bytes
from flowroll.wire.dialects import rollout_from_wire, rollout_to_wire
from flowroll.wire.messages import WireSample
from flowroll.wire.safetensors import safetensors_prefix

_CONTENT_KEY = "flowroll.rollout"
VERSION_KEY = "flowroll.schema_version"
# How the name of a file ends that is not complete.
PART = ".part"
# What reading a file raises that is cut, damaged or something else.
DAMAGE = (SafetensorError, msgspec.DecodeError, ValueError, KeyError, RecursionError, AssertionError)


class _TensorName(msgspec.Struct, frozen=True, omit_defaults=True):
    """The name that stands for a tensor of the file, or for bytes that are stored as one."""

    name: str = msgspec.field(name="__tensor__")
    is_bytes: bool = msgspec.field(name="__bytes__", default=False)


_CONTENT = msgspec.json.Decoder(WireSample[_TensorName])


def save_rollout(path: str | Path, rollout: Rollout) -> None:
    """Writes a rollout to a file, whole or not at all: a file of that name is replaced only when the new one is complete.

    Raises:
        RolloutFileError: The file cannot be written there.
    """
    content, tensors = flatten(rollout)
    write_tensors(Path(path), tensors, {VERSION_KEY: str(SCHEMA_VERSION), _CONTENT_KEY: content})


def flatten(rollout: Rollout, prefix: str = "", *, bytes_apart: bool = False) -> tuple[str, dict[str, Tensor]]:
    """Returns the JSON text of a rollout, and the tensors for which names stand in it.

    Args:
        rollout: The rollout.
        prefix: In front of the name of every tensor.
        bytes_apart: Whether bytes (PNG files) become tensors too, in place of base64 in the text.
    """
    found: dict[str, Tensor] = {}
    content = _without_tensors(rollout_to_wire(rollout, "native"), prefix, found, bytes_apart)
    return msgspec.json.encode(content).decode(), found


def unflatten(content: str | bytes, load: Callable[[str], Tensor]) -> Rollout:
    """Makes the rollout of a JSON text that `flatten` wrote.

    Args:
        content: The text.
        load: Returns the tensor of a name.

    Raises:
        ValueError: The text is no such one.
    """
    sample = _CONTENT.decode(content)

    def whole(value: Any) -> Any:
        return _bytes_of(value, load) if isinstance(value, _TensorName) and value.is_bytes else value

    images = sample.step_images
    sample = msgspec.structs.replace(
        sample,
        generated_output=whole(sample.generated_output),
        step_images=None if images is None else msgspec.structs.replace(images, images=list(map(whole, images.images))),
    )
    return rollout_from_wire(sample, lambda leaf: load(leaf.name))


def outline(content: str | bytes) -> WireSample[_TensorName]:
    """Reads a JSON text that `flatten` wrote without the tensors, for which their names stand.

    Raises:
        ValueError: The text is no such one.
    """
    return _CONTENT.decode(content)


def picture_of(sample: WireSample[_TensorName], load: Callable[[str], Tensor]) -> Tensor | bytes | None:
    """Reads the picture alone of a sample whose text `outline` read; None: nothing was decoded.

    Args:
        sample: The sample.
        load: Returns the tensor of a name.
    """
    found = sample.generated_output
    if not isinstance(found, _TensorName):
        return found
    return _bytes_of(found, load) if found.is_bytes else load(found.name)


def _bytes_of(name: _TensorName, load: Callable[[str], Tensor]) -> bytes:
    return bytes(tensor_bytes(load(name.name).contiguous()))


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        RolloutFileError: The file cannot be written there.
    """
    # Widest dtype first, as safetensors itself does, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    plain = {name: plain_tensor(tensors[name], name) for name in names}

    def pieces() -> Iterable[bytes | memoryview]:
        yield safetensors_prefix(plain, metadata=metadata)
        yield from map(tensor_bytes, plain.values())

    write_whole(target, pieces())


def write_whole(target: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file from its pieces, whole or not at all: a file of that name is replaced only when the new one is complete.

    Raises:
        RolloutFileError: The file cannot be written there.
    """
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}{PART}")
    try:
        with open(unfinished, "xb") as file:
            for piece in pieces:
                file.write(piece)
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
        RolloutFileError: The file is missing, truncated, not a rollout, or of a later schema version.
    """
    with _opened(Path(path)) as (content, load):
        return unflatten(content, load)


def load_outline(path: str | Path) -> tuple[WireSample[_TensorName], Tensor | None]:
    """Reads the text of the rollout in a file, and its log-probs, but none of the large tensors.

    Raises:
        RolloutFileError: As of `load_rollout`.
    """
    with _opened(Path(path)) as (content, load):
        sample = outline(content)
        log_probs = sample.rollout_log_probs
        return sample, None if log_probs is None else load(log_probs.name)


def load_picture(path: str | Path) -> Tensor | bytes | None:
    """Reads the picture alone of the rollout in a file; None: nothing was decoded.

    Raises:
        RolloutFileError: As of `load_rollout`.
    """
    with _opened(Path(path)) as (content, load):
        return picture_of(outline(content), load)


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[str, Callable[[str], Tensor]]]:
    """Gives the JSON text in a rollout file, and what reads a tensor of it."""
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            check_version(source, metadata.get(VERSION_KEY))
            yield metadata[_CONTENT_KEY], lambda name: own_tensor(file, name)
    except OSError as error:
        raise RolloutFileError(f"path must be a readable rollout file, got {source} ({error}); check the name.") from error
    except DAMAGE as error:
        raise RolloutFileError(
            f"path must be a whole rollout file, got {source} ({error}); it is damaged or foreign, save the rollout again."
        ) from error


def check_version(source: Path, version: str | None) -> None:
    """Refuses a file without a schema version, or of one that this flowroll does not read.

    Raises:
        RolloutFileError: It is such a file.
    """
    if version is None:
        raise RolloutFileError(
            f"path must be a rollout file, got {source}, which has no {VERSION_KEY}; use a file that save_rollout wrote."
        )
    if not (version.isdecimal() and is_readable_version(int(version))):
        raise RolloutFileError(
            f"{VERSION_KEY} must be at most {SCHEMA_VERSION}, got {version} in {source}; read it with a later flowroll."
        )


def own_tensor(file: Any, name: str) -> Tensor:
    """Returns a tensor of an open safetensors file, in memory of its own."""
    # A clone: `get_tensor` gives a window on the mapped file, which would change with a file that is rewritten in place.
    tensor: Tensor = file.get_tensor(name)
    return tensor.clone()


def _without_tensors(value: object, name: str, found: dict[str, Tensor], bytes_apart: bool) -> object:
    """Returns the value with each tensor, at any depth, replaced by its name and added to `found`."""
    if isinstance(value, Tensor):
        found[name] = value
        return _TensorName(name=name)
    if bytes_apart and isinstance(value, bytes) and value:
        found[name] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return _TensorName(name=name, is_bytes=True)
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, f"{name}.{key}".lstrip("."), found, bytes_apart) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_tensors(item, f"{name}.{index}", found, bytes_apart) for index, item in enumerate(value)]
    return value
