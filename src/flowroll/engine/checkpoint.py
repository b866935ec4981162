"""Loads a diffusers checkpoint folder, offline, after looking at its files.

Owns everything that can be wrong with a folder. diffusers and transformers fill in missing weights with random ones, or
fail deep inside; here a bad folder is one clear error before anything is built.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from flowroll.errors import CheckpointError, UnsupportedModelError
from flowroll.families import Family, ModelSpec, family_of_pipeline
from flowroll.sampling.schedule import ScheduleConfig

_INDEX = "model_index.json"
_TORCH_COMPONENTS = ("transformer", "vae", "text_encoder")
_COMPONENTS = (*_TORCH_COMPONENTS, "tokenizer", "scheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        family: How to call it.
        variant: Which of the family's variants it is taken for.
        pipeline: The diffusers pipeline that holds the modules.
        spec: The facts that shape its latents.
        schedule_config: Its sigma grid.
        device: Where the modules are.
        dtype: Of the weights.
    """

    family: Family
    variant: str
    pipeline: Any
    spec: ModelSpec
    schedule_config: ScheduleConfig
    device: torch.device
    dtype: torch.dtype


def load_model(folder: Path, *, variant: str | None, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Loads the checkpoint in `folder`.

    Args:
        folder: A diffusers checkpoint folder; nothing is downloaded.
        variant: Variant of the family; None: the family's first.
        device: Where to put the modules.
        dtype: Dtype of all modules.

    Raises:
        CheckpointError: Not a checkpoint, or one with a missing, truncated or mismatched file.
        UnsupportedModelError: A checkpoint of a kind that flowroll does not know.
    """
    index = _read_json(folder / _INDEX, f"{folder} must be a diffusers checkpoint folder")
    family = family_of_pipeline(str(index.get("_class_name")))
    variant = _resolve_variant(family, variant)
    weights = {name: _check_component(folder, name) for name in _COMPONENTS}
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "scheduler must have a configuration")
    schedule_config = ScheduleConfig.from_scheduler_config(scheduler)
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:
        # Whatever the libraries raise here is about this folder's content, checked above as far as it can be.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder} must load as {family.pipeline_class}, got {reason}; save the checkpoint again."
        ) from error
    _check_complete(folder, "transformer", pipeline.transformer, weights["transformer"])
    _check_complete(folder, "vae", pipeline.vae, weights["vae"])
    pipeline.set_progress_bar_config(disable=True)
    for name in _TORCH_COMPONENTS:
        getattr(pipeline, name).requires_grad_(False).eval()
    return LoadedModel(
        family=family,
        variant=variant,
        pipeline=pipeline.to(device),
        spec=family.spec(pipeline),
        schedule_config=schedule_config,
        device=device,
        dtype=dtype,
    )


def _resolve_variant(family: Family, variant: str | None) -> str:
    known = list(family.variants)
    if variant is None:
        return known[0]
    if variant not in known:
        raise UnsupportedModelError(
            f"variant must be one of {', '.join(known)} for {family.name}, got {variant}; leave it out for {known[0]}."
        )
    return variant


def _read_json(path: Path, rule: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{rule}, got no {path.name}; give the folder that holds {_INDEX}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON, got {error}; copy the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(value).__name__}; copy the file again.")
    return value


def _check_component(folder: Path, name: str) -> set[str]:
    """Checks that a component's files are there and whole; returns the names of its stored tensors."""
    component = folder / name
    if not component.is_dir():
        raise CheckpointError(f"{folder} must hold a folder {name}, got none; copy the whole checkpoint.")
    if name not in _TORCH_COMPONENTS:
        return set()
    _read_json(component / "config.json", f"{component} must have a configuration")
    files = {path.name for path in component.glob("*.safetensors")}
    for index in component.glob("*.safetensors.index.json"):
        shards = set(_read_json(index, f"{index} must be readable").get("weight_map", {}).values())
        if missing := sorted(shards - files):
            raise CheckpointError(f"{component} must hold every shard, got no {', '.join(missing)}; copy the missing files.")
    if not files:
        raise CheckpointError(f"{component} must hold .safetensors weights, got none; copy the whole checkpoint.")
    return {tensor for file in sorted(files) for tensor in _check_safetensors(component / file)}


def _check_safetensors(path: Path) -> set[str]:
    """Names of the tensors in a file whose length is what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        raw = file.read(length) if 0 < length <= size - 8 else b""
    try:
        header = json.loads(raw)
        end = 8 + length + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} must be a safetensors file, got a broken header; copy the file again.") from error
    if end != size:
        raise CheckpointError(f"{path} must be {end} bytes long, got {size}; the file is truncated, copy it again.")
    return set(header) - {"__metadata__"}


def _check_complete(folder: Path, name: str, module: torch.nn.Module, stored: set[str]) -> None:
    if missing := sorted(set(module.state_dict()) - stored):
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{folder / name} must hold every weight of {type(module).__name__}, got none for {shown}; save it again."
        )
