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
import transformers
from diffusers import DiffusionPipeline

from flowroll.errors import CheckpointError, FlowrollError, UnsupportedModelError
from flowroll.families import Family, ModelSpec, family_of_pipeline
from flowroll.families.alignment import align_weights
from flowroll.sampling.schedule import ScheduleConfig

_INDEX = "model_index.json"
_TORCH_COMPONENTS = ("transformer", "vae", "text_encoder")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_PROBE = "a red circle"
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
        pipeline = _load_pipeline(folder, index, dtype)
        _check_complete(folder, "transformer", pipeline.transformer, weights["transformer"])
        _check_complete(folder, "vae", pipeline.vae, weights["vae"])
        pipeline.to(device)
        # Mapped from a file, they lie wherever its header's length puts them, and bits would depend on that.
        align_weights(pipeline.transformer)
        spec = family.spec(pipeline)
        _check_text(family, pipeline)
    except FlowrollError:
        raise
    except Exception as error:
        # Whatever the libraries raise here is about this folder's content, checked above as far as it can be.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder} must load as {family.pipeline_class}, got {reason}; save the checkpoint again."
        ) from error
    return LoadedModel(
        family=family,
        variant=variant,
        pipeline=pipeline,
        spec=spec,
        schedule_config=schedule_config,
        device=device,
        dtype=dtype,
    )


def _load_pipeline(folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline in evaluation mode, on the CPU."""
    text_class = getattr(transformers, str(index["text_encoder"][1]))
    text_encoder, report = text_class.from_pretrained(
        folder / "text_encoder", dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise _incomplete(folder, "text_encoder", text_encoder, missing)
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder=text_encoder, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for name in _TORCH_COMPONENTS:
        # Not frozen: torch picks another kernel for some products whose weight needs no gradient, and a pipeline's weights,
        # like a trainer's, do. Nothing here records a graph.
        getattr(pipeline, name).eval()
    return pipeline


def _check_text(family: Family, pipeline: Any) -> None:
    """Encodes a prompt: a broken tokenizer, template or text encoder shows here and not in the first request."""
    with torch.no_grad():
        embeds = family.encode(pipeline, _PROBE)[family.embeds_key]
    assert isinstance(embeds, torch.Tensor)
    if embeds.shape[0] < len(_PROBE.split()):
        raise CheckpointError(f"tokenizer must give a token per word, got {embeds.shape[0]} for {_PROBE!r}; copy it again.")


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
    if name == "tokenizer" and not any(all((component / file).is_file() for file in files) for files in _VOCABULARIES):
        raise CheckpointError(f"{component} must hold a vocabulary, got no tokenizer.json; copy the whole checkpoint.")
    if name not in _TORCH_COMPONENTS:
        return set()
    _read_json(component / "config.json", f"{component} must have a configuration")
    return {tensor for file in _weight_files(component) for tensor in _check_safetensors(component / file)}


def _weight_files(component: Path) -> list[str]:
    """The files that the libraries will read: the shards of the index where there is one, else the single file."""
    for stem in _WEIGHT_STEMS:
        index = component / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = set(_read_json(index, f"{index} must be readable").get("weight_map", {}).values())
            if missing := sorted(shard for shard in shards if not (component / shard).is_file()):
                raise CheckpointError(
                    f"{component} must hold every shard, got no {', '.join(missing)}; copy the missing files."
                )
            return sorted(shards)
        if (component / f"{stem}.safetensors").is_file():
            return [f"{stem}.safetensors"]
    raise CheckpointError(f"{component} must hold .safetensors weights, got none; copy the whole checkpoint.")


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
        raise _incomplete(folder, name, module, missing)


def _incomplete(folder: Path, name: str, module: torch.nn.Module, missing: list[str]) -> CheckpointError:
    shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
    return CheckpointError(
        f"{folder / name} must hold every weight of {type(module).__name__}, got none for {shown}; save it again."
    )
