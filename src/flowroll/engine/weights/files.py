"""Which files of a module's folder hold its weights, by the names that diffusers and transformers give them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowroll.errors import CheckpointError

TEXT_STEM = "model"
WEIGHT_STEMS = ("diffusion_pytorch_model", TEXT_STEM)
_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".dduf")


def read_json(path: Path, rule: str) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: There is none; it begins with `rule` if there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"{rule}, got no {path.name}; give the folder that holds model_index.json.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}; copy the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(value).__name__}; copy the file again.")
    return value


def some_of(names: Collection[str]) -> str:
    """Names as a message shows them: in order, and not too many."""
    return ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")


def weight_files(folder: Path, stems: Collection[str] = WEIGHT_STEMS) -> list[str]:
    """The files of a module's folder that the libraries will read: the shards of the index where there is one, else one file.

    Args:
        folder: Of the module.
        stems: Names that the files may begin with, the preferred one first.

    Raises:
        CheckpointError: There are none, or some are missing.
    """
    chosen = chosen_file(folder, stems).path
    return sorted(set(weight_map(folder, chosen).values())) if chosen.suffix == ".json" else [chosen.name]


@dataclass(frozen=True, slots=True)
class ChosenWeights:
    """The one file, or the index, that the libraries choose, and the variant that they have to be asked for."""

    path: Path
    variant: str | None


def chosen_file(folder: Path, stems: Collection[str]) -> ChosenWeights:
    """What the libraries choose; where there are weights of one variant alone, those.

    Raises:
        CheckpointError: There are none, or those of several variants.
    """
    for stem in stems:
        for pattern in _patterns(stem):
            if (path := folder / pattern.format(stem=stem, variant="")).is_file():
                return ChosenWeights(path, None)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variants = {
        variant: folder / name
        # The preferred ones last, so that they stay.
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
    """The names of a file and an index, the preferred one first: where there are both, the libraries differ.

    The place of the variant is that of diffusers' and transformers' own `_add_variant`.
    """
    single, index = "{stem}{variant}.safetensors", "{stem}.safetensors.index{variant}.json"
    return (single, index) if stem == TEXT_STEM else (index, single)


def _variant_of(name: str, pattern: str, stem: str) -> str | None:
    """The variant in the name of a file or an index; None for other files, and for one shard of several."""
    head, tail = pattern.format(stem=stem, variant="/").split("/")
    middle = name.removeprefix(head).removesuffix(tail)
    if len(middle) + len(head) + len(tail) != len(name) or not re.fullmatch(r"\.[^.]+", middle):
        return None
    return None if re.search(r"-\d{5}-of-\d{5}$", middle) else middle[1:]


def weight_map(folder: Path, index: Path) -> dict[str, str]:
    """The file of each tensor, from an index whose files are all there."""
    found = read_json(index, f"{index} must be readable").get("weight_map")
    # A name with a folder in it could lead anywhere.
    if not (isinstance(found, dict) and found and all(map(_is_file_name, found.values()))):
        raise CheckpointError(f"{index} must map weights to files beside it, got something else; save the checkpoint again.")
    if missing := sorted(shard for shard in set(found.values()) if not (folder / shard).is_file()):
        raise CheckpointError(f"{folder} must hold every shard, got no {', '.join(missing)}; copy the missing files.")
    return found


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value != ""
