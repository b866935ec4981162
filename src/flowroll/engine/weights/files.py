"""Finds the files of a module's folder that hold its weights, by the names that diffusers and transformers give them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowroll.errors import CheckpointError

TEXT_STEM = "model"
WEIGHT_STEMS = ("diffusion_pytorch_model", TEXT_STEM)
# Several times what the index of the largest models takes: some 100 bytes for each of their tensors.
MAX_JSON_BYTES = 4 * 2**20
_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".dduf")


def read_json(path: Path, rule: str) -> Mapping[str, Any]:
    """Reads the JSON object in a file of at most `MAX_JSON_BYTES`.

    Args:
        path: The file.
        rule: The beginning of the error message if there is no such file.

    Raises:
        CheckpointError: There is no such file, it is too large, or it holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{rule}, got no {path.name}; give the folder that holds model_index.json.")
    try:
        text = _bounded_text(path)
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON, got {error}; copy the file again.") from error
    return parse_json(text, str(path))


def parse_json(text: str, subject: str) -> Mapping[str, Any]:
    """Parses a JSON object.

    Raises:
        CheckpointError: The text is too long, or holds no JSON object; the error begins with the subject.
    """
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{subject} must have at most {MAX_JSON_BYTES} bytes, got more; copy the file again.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{subject} must be JSON, got {error}; copy the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{subject} must hold an object, got {type(value).__name__}; copy the file again.")
    return value


def _bounded_text(path: Path) -> str:
    """Reads a small text file. What is read is bounded, not only the size that was looked at: the file may grow meanwhile."""
    # O_NONBLOCK, because opening a pipe would otherwise wait for its other end forever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path} must be a regular file, got another kind; copy the file again.")
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} must have at most {MAX_JSON_BYTES} bytes, got more; copy the file again.")
    return data.decode("utf-8")


def some_of(names: Collection[str]) -> str:
    """Joins names for an error message: sorted, and at most three of them."""
    return ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")


def weight_files(folder: Path, stems: Collection[str] = WEIGHT_STEMS) -> list[str]:
    """Returns the names of the files that the libraries will read: the shards of the index if there is one, else one file.

    Args:
        folder: The module's folder.
        stems: The names that the files may begin with, the preferred one first.

    Raises:
        CheckpointError: There are no weights, those of several variants, or some files are missing.
    """
    chosen = chosen_file(folder, stems).path
    return sorted(set(weight_map(folder, chosen).values())) if chosen.suffix == ".json" else [chosen.name]


@dataclass(frozen=True, slots=True)
class ChosenWeights:
    """The file or the index that the libraries choose, and the variant that they have to be asked for, or None."""

    path: Path
    variant: str | None


def chosen_file(folder: Path, stems: Collection[str]) -> ChosenWeights:
    """Returns the file or index that the libraries choose; if there are only weights of one variant, that variant's.

    Raises:
        CheckpointError: There are no weights, or only those of several variants.
    """
    for stem in stems:
        for pattern in _patterns(stem):
            if (path := folder / pattern.format(stem=stem, variant="")).is_file():
                return ChosenWeights(path, None)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variants = {
        variant: folder / name
        # The preferred names come last, so that they overwrite the others.
        for stem in reversed(tuple(stems))
        for pattern in reversed(_patterns(stem))
        for name in names
        if (variant := _variant_of(name, pattern, stem)) and (folder / name).is_file()
    }
    if len(variants) == 1:
        ((variant, path),) = variants.items()
        return ChosenWeights(path, variant)
    if variants:
        found = f"the variants {', '.join(sorted(variants))}"
        raise CheckpointError(f"{folder} must hold the weights of one variant, got {found}; remove all but one.")
    others = [name for name in names if name.endswith(_WEIGHT_SUFFIXES) and (folder / name).is_file()]
    raise CheckpointError(
        f"{folder} must hold .safetensors weights, got {some_of(others) if others else 'none'}; copy the whole checkpoint, or "
        "save it again with save_pretrained."
    )


def _patterns(stem: str) -> tuple[str, str]:
    """Returns the name patterns of a file and an index, the preferred one first; the two libraries prefer different ones.

    The variant stands where `_add_variant` of diffusers and transformers puts it.
    """
    single, index = "{stem}{variant}.safetensors", "{stem}.safetensors.index{variant}.json"
    return (single, index) if stem == TEXT_STEM else (index, single)


def _variant_of(name: str, pattern: str, stem: str) -> str | None:
    """Returns the variant in the name of a file or an index; None for other files and for a shard."""
    head, tail = pattern.format(stem=stem, variant="/").split("/")
    middle = name.removeprefix(head).removesuffix(tail)
    if len(middle) + len(head) + len(tail) != len(name) or not re.fullmatch(r"\.[^.]+", middle):
        return None
    return None if re.search(r"-\d{5}-of-\d{5}$", middle) else middle[1:]


def weight_map(folder: Path, index: Path) -> dict[str, str]:
    """Returns the file name of each tensor from an index.

    Raises:
        CheckpointError: The index is unreadable, names no files beside it, or a file is missing.
    """
    found = read_json(index, f"{index} must be readable").get("weight_map")
    # A name that contains a folder could lead out of the checkpoint.
    if not (isinstance(found, dict) and found and all(map(_is_file_name, found.values()))):
        raise CheckpointError(f"{index} must map weights to files beside it, got something else; save the checkpoint again.")
    if missing := sorted(shard for shard in set(found.values()) if not (folder / shard).is_file()):
        raise CheckpointError(f"{folder} must hold every shard, got no {', '.join(missing)}; copy the missing files.")
    return found


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value != ""
