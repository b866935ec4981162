"""Looks at a diffusers checkpoint folder before anything is loaded from it.

Owns everything that can be wrong with the files of a folder. diffusers and transformers fill in missing weights with random
ones, or fail deep inside; here a bad folder is one clear error before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowroll.engine.tensorfile import TensorFile
from flowroll.errors import CheckpointError, UnsupportedModelError
from flowroll.families import Family, family_of_pipeline
from flowroll.sampling.schedule import ScheduleConfig

_INDEX = "model_index.json"
# Ours, optional: what model_index.json does not say.
_NOTES = "flowroll.json"
TORCH_COMPONENTS = ("transformer", "vae", "text_encoder")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_COMPONENTS = (*TORCH_COMPONENTS, "tokenizer", "scheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder whose files are all there and whole.

    Attributes:
        folder: Where it is.
        index: Its model_index.json.
        family: Whose checkpoint it is.
        variant: Which of the family's variants it is taken for.
        schedule_config: Its sigma grid.
        stored: Names of the tensors that each component's files hold.
    """

    folder: Path
    index: Mapping[str, Any]
    family: Family
    variant: str
    schedule_config: ScheduleConfig
    stored: Mapping[str, set[str]]

    def class_of(self, component: str) -> str:
        """The class that the component is saved as."""
        return str(self.index[component][1])

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component."""
        return [self.folder / component / name for name in weight_files(self.folder / component)]

    def check_complete(self, component: str, module: torch.nn.Module) -> None:
        """Refuses a component whose files lack a weight of the module.

        Raises:
            CheckpointError: It names some that are missing.
        """
        if missing := sorted(set(module.state_dict()) - self.stored[component]):
            raise self.incomplete(component, module, missing)

    def incomplete(self, component: str, module: torch.nn.Module, missing: list[str]) -> CheckpointError:
        """What to raise where weights are missing."""
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        return CheckpointError(
            f"{self.folder / component} must hold every weight of {type(module).__name__}, got none for {shown}; save it again."
        )


def examine_checkpoint(folder: Path, *, variant: str | None) -> Checkpoint:
    """Looks at the files in `folder`; nothing is loaded or downloaded.

    Args:
        folder: A diffusers checkpoint folder.
        variant: Variant of the family; None: the one that the folder's flowroll.json names, else the family's first.

    Raises:
        CheckpointError: Not a checkpoint, or one with a missing, truncated or mismatched file.
        UnsupportedModelError: A checkpoint of a kind that flowroll does not know.
    """
    index = read_json(folder / _INDEX, f"{folder} must be a diffusers checkpoint folder")
    family = family_of_pipeline(str(index.get("_class_name")))
    variant = _resolve_variant(family, variant or _noted_variant(folder))
    stored = {name: _check_component(folder, name) for name in _COMPONENTS}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "scheduler must have a configuration")
    return Checkpoint(
        folder=folder,
        index=index,
        family=family,
        variant=variant,
        schedule_config=ScheduleConfig.from_scheduler_config(scheduler),
        stored=stored,
    )


def _noted_variant(folder: Path) -> str | None:
    """What the folder's own flowroll.json says; None where there is no such file."""
    path = folder / _NOTES
    if not path.is_file():
        return None
    notes = read_json(path, f"{path} must be readable")
    variant = notes.get("variant")
    if set(notes) != {"variant"} or not isinstance(variant, str):
        raise CheckpointError(f'{path} must be {{"variant": NAME}}, got {json.dumps(notes)[:100]}; correct or remove it.')
    return variant


def _resolve_variant(family: Family, variant: str | None) -> str:
    known = list(family.variants)
    if variant is None:
        return known[0]
    if variant not in known:
        raise UnsupportedModelError(
            f"variant must be one of {', '.join(known)} for {family.name}, got {variant}; leave it out for {known[0]}."
        )
    return variant


def read_json(path: Path, rule: str) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: There is none; it begins with `rule` if there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"{rule}, got no {path.name}; give the folder that holds {_INDEX}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}; copy the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(value).__name__}; copy the file again.")
    return value


def _check_component(folder: Path, name: str) -> set[str]:
    """Checks that a component's files are there and whole; returns the names of its stored tensors."""
    component = folder / name
    if not component.is_dir():
        raise CheckpointError(f"{folder} must hold a folder {name}, got none; copy the whole checkpoint.")
    if name == "tokenizer" and not any(all((component / file).is_file() for file in files) for files in _VOCABULARIES):
        raise CheckpointError(f"{component} must hold a vocabulary, got no tokenizer.json; copy the whole checkpoint.")
    if name not in TORCH_COMPONENTS:
        return set()
    read_json(component / "config.json", f"{component} must have a configuration")
    names: set[str] = set()
    for file in weight_files(component):
        with TensorFile(component / file) as tensors:
            names |= {tensor.name for tensor in tensors.stored}
    return names


def weight_files(folder: Path) -> list[str]:
    """The files of a module's folder that the libraries will read: the shards of the index where there is one, else one file.

    Raises:
        CheckpointError: There are none, or some are missing.
    """
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(folder, index)
        if (folder / f"{stem}.safetensors").is_file():
            return [f"{stem}.safetensors"]
    raise CheckpointError(f"{folder} must hold .safetensors weights, got none; copy the whole checkpoint.")


def _shards(folder: Path, index: Path) -> list[str]:
    weight_map = read_json(index, f"{index} must be readable").get("weight_map")
    found = list(weight_map.values()) if isinstance(weight_map, dict) else []
    shards = {shard for shard in found if isinstance(shard, str)}
    # A name with a folder in it could lead anywhere.
    if not shards or not all(isinstance(shard, str) and Path(shard).name == shard != "" for shard in found):
        raise CheckpointError(f"{index} must map weights to files beside it, got something else; save the checkpoint again.")
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise CheckpointError(f"{folder} must hold every shard, got no {', '.join(missing)}; copy the missing files.")
    return sorted(shards)
