"""Checks a diffusers checkpoint folder before anything is loaded from it.

This module owns everything that can be wrong with the files of a folder. diffusers and transformers replace missing weights by
random ones, ignore unknown ones, read any dtype as if it were the weight's own, or fail deep inside. Here a bad folder gives
one clear error, and if the files alone show the problem, before anything is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from flowroll.engine.weights.files import TEXT_STEM, WEIGHT_STEMS, chosen_file, read_json, some_of, weight_files, weight_map
from flowroll.engine.weights.tensorfile import TensorFile
from flowroll.errors import CheckpointError, UnsupportedModelError
from flowroll.families import Family, family_of_pipeline
from flowroll.sampling.schedule import ScheduleConfig
from flowroll.types import all_finite

_INDEX = "model_index.json"
# The entry of the index for a component that the pipeline was saved without.
_NOT_SAVED = [None, None]
# An optional file of flowroll's own, for what model_index.json cannot say.
_NOTES = "flowroll.json"
# The modules that every pipeline has, besides its text encoders.
_TRANSFORMER, _VAE = "transformer", "vae"
_SCHEDULER = "scheduler"
# The dtypes that a weight may be stored in: floats that hold its value without a separate scale.
_FLOATS = ("F64", "F32", "F16", "BF16")
# The dtypes that counters and positions are stored in.
_INTEGERS = ("BOOL", "U8", "I16", "I32", "I64")
# Options of a component's configuration that make its library load something other than the floats in its files.
_REDIRECTIONS = ("quantization_config", "compression_config", "transformers_weights")
# The prefixes that torch puts before the name of a class: _fully_shard/_fsdp_init.py, _composable/replicate.py.
_WRAPPERS = ("FSDP", "Replicate", "DDP")
# The options of a configuration that say how often something is built.
_LAYERS = re.compile(r"(^|_)(layers?|depths?)($|_per_block$)|^num_\w*blocks?$")
# So many layers are built even where fewer are stored, since some options name layers that the model does not have.
_MOST_LAYERS = 1024
# No list in a configuration is longer, such as those of channels or of a latent's means.
_MOST_ITEMS = 4096
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder whose files are complete.

    Attributes:
        folder: The path of the folder.
        index: The content of its model_index.json.
        family: The model family.
        variant: The variant of the family that it is used as.
        schedule_config: The configuration of its sigma grid.
        stored: For each component that has weights, the dtypes of its stored tensors by name, as safetensors names dtypes.
    """

    folder: Path
    index: Mapping[str, Any]
    family: Family
    variant: str
    schedule_config: ScheduleConfig
    stored: Mapping[str, Mapping[str, str]]

    @property
    def pipeline_class(self) -> str:
        """The name of the pipeline's class."""
        return str(self.index["_class_name"])

    @property
    def modules(self) -> tuple[str, ...]:
        """The components that have weights: the transformer, the VAE, and the text encoders that were saved."""
        return tuple(self.stored)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that were saved."""
        return tuple(name for name in self.family.text_encoders if name in self.stored)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers that were saved."""
        return tuple(name for name in self.family.tokenizers if self.index.get(name, _NOT_SAVED) != _NOT_SAVED)

    @property
    def absent(self) -> tuple[str, ...]:
        """The components that were not saved or that the family has no use for.

        Whoever loads the pipeline has to pass None for them.
        """
        used = {*self.modules, *self.family.tokenizers, _SCHEDULER}
        unused = (
            name for name, entry in self.index.items() if entry == _NOT_SAVED or (_is_component(entry) and name not in used)
        )
        optional = (name for name in self.family.optional_components if name not in self.index)
        return (*unused, *optional)

    @property
    def options(self) -> dict[str, Any]:
        """The pipeline's own options in the index, beside its components."""
        return {
            name: value
            for name, value in self.index.items()
            if not name.startswith("_") and not _is_component(value) and value is not None
        }

    def class_of(self, component: str) -> str:
        """Returns the name of the class that the component was saved as."""
        return plain_class(str(self.index[component][1]))

    def weights_variant(self, component: str) -> str | None:
        """Returns the variant of a component's files that its library has to be asked for, e.g. "fp16"; None if it has none."""
        return chosen_file(self.folder / component, _stems(component)).variant

    def weight_files(self, component: str) -> list[Path]:
        """Returns the paths of the safetensors files of a component."""
        folder = self.folder / component
        return [folder / name for name in weight_files(folder, _stems(component))]

    def check_stored(self, component: str, module: torch.nn.Module) -> None:
        """Checks the names and dtypes of a component's tensors against the module that they are for.

        It applies the rule of diffusers' loader to a module that is filled without that loader.

        Raises:
            CheckpointError: A weight is missing, unknown, or no float.
        """
        stored, expected = set(self.stored[component]), set(module.state_dict())
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        unknown = {name for name in stored - expected if not any(re.search(pattern, name) for pattern in ignored)}
        self.check_loaded(component, module, missing=expected - stored, unknown=unknown)

    def check_loaded(self, component: str, module: torch.nn.Module, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
        """Refuses a component whose files do not hold exactly its module's weights.

        Args:
            component: The name of the component.
            module: The module that it was loaded as.
            missing: The names of weights that the loader did not find.
            unknown: The names of tensors that the loader could not place, without those that the class declares as ignored.

        Raises:
            CheckpointError: Weights are missing, unknown or no floats; the error names some of them.
        """
        kind = type(module).__name__
        if missing := sorted(missing):
            raise self._unfit(component, f"hold every weight of {kind}", f"none for {some_of(missing)}", "save it again")
        if unknown := sorted(unknown):
            remedy = "save it as that class, without scales or heads beside its weights"
            raise self._unfit(component, f"hold the weights of {kind} alone", f"others: {some_of(unknown)}", remedy)
        # A class may rename what it loads, but hardly the last part of a name. A last part that no weight has is a counter's.
        leaves = {name.rpartition(".")[2] for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        odd = {name: dtype for name, dtype in self.stored[component].items() if dtype not in _FLOATS}
        if wrong := sorted(name for name in odd if name.rpartition(".")[2] in leaves):
            raise self._unfit(
                component,
                f"hold its weights in one of {', '.join(_FLOATS)}",
                f"{odd[wrong[0]]} for {some_of(wrong)}",
                _SAVE_FLOATS,
            )

    def check_finite(self, component: str, module: torch.nn.Module) -> None:
        """Refuses a component with NaN or infinity in its weights, as they are in memory.

        Raises:
            CheckpointError: A weight is not finite; the error names some.
        """
        if odd := [name for name, weight in module.named_parameters() if not all_finite(weight.detach())]:
            raise self._unfit(component, "hold finite weights", f"NaN or infinity in {some_of(odd)}", "copy it again")

    def _unfit(self, component: str, rule: str, got: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / component} must {rule}, got {got}; {remedy}.")


_SAVE_FLOATS = "dequantize it and save it in one of these"


def plain_class(name: str) -> str:
    """Returns the name of a model's class without the prefixes of a trainer's wrapper.

    torch's composable wrappers (`fully_shard`, `replicate`) change the class of a module in place, so a wrapped module is saved
    under a name like FSDPQwenImageTransformer2DModel.
    """
    while prefix := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def examine_checkpoint(folder: Path, *, variant: str | None) -> Checkpoint:
    """Checks the files in `folder`. Nothing is loaded or downloaded.

    Args:
        folder: A diffusers checkpoint folder.
        variant: The variant of the family; None: the one that the folder's flowroll.json names, else the family's first.

    Raises:
        CheckpointError: It is not a checkpoint, or a file is missing, truncated or mismatched.
        UnsupportedModelError: The checkpoint is of a kind that flowroll does not know.
    """
    index = read_json(folder / _INDEX, f"{folder} must be a diffusers checkpoint folder")
    family = family_of_pipeline(str(index.get("_class_name")))
    variant = _resolve_variant(family, index, variant or _noted_variant(folder))
    encoders, tokenizers = (_saved(index, family, names) for names in (family.text_encoders, family.tokenizers))
    stored = {name: _check_module(_component(folder, name), name) for name in (_TRANSFORMER, _VAE, *encoders)}
    for encoder, name in zip(family.text_encoders, family.tokenizers, strict=False):
        if encoder in encoders and name not in tokenizers:
            rule = f"name the class of {name}, which {encoder} needs"
            raise CheckpointError(f"{_INDEX} must {rule}, got none; save the checkpoint with both, or without {encoder}.")
    for name in tokenizers:
        _check_tokenizer(_component(folder, name))
    _component(folder, _SCHEDULER)
    _check_scheduler_class(index)
    scheduler = read_json(folder / _SCHEDULER / "scheduler_config.json", "scheduler must have a configuration")
    return Checkpoint(
        folder=folder,
        index=index,
        family=family,
        variant=variant,
        schedule_config=ScheduleConfig.from_scheduler_config(scheduler),
        stored=stored,
    )


def _check_scheduler_class(index: Mapping[str, Any]) -> None:
    """Checks the scheduler's class in the index: diffusers loads that class, whatever the scheduler's configuration says."""
    entry = index.get(_SCHEDULER)
    name = entry[1] if _is_component(entry) else entry
    ScheduleConfig.from_scheduler_config({"_class_name": name})


def _is_component(entry: object) -> TypeGuard[list[Any]]:
    """Tells whether an entry of the index is that of a component: a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)


def _noted_variant(folder: Path) -> str | None:
    """Returns the variant that the folder's flowroll.json names; None if there is no such file."""
    path = folder / _NOTES
    if not path.is_file():
        return None
    notes = read_json(path, f"{path} must be readable")
    variant = notes.get("variant")
    if set(notes) != {"variant"} or not isinstance(variant, str):
        raise CheckpointError(f'{path} must be {{"variant": NAME}}, got {json.dumps(notes)[:100]}; correct or remove it.')
    return variant


def _resolve_variant(family: Family, index: Mapping[str, Any], variant: str | None) -> str:
    known = family.variants_of(index)
    if variant is None:
        return known[0]
    if variant not in known:
        raise UnsupportedModelError(
            f"variant must be one of {', '.join(known)} for {family.name}, got {variant}; leave it out for {known[0]}."
        )
    return variant


def _saved(index: Mapping[str, Any], family: Family, names: Iterable[str]) -> list[str]:
    """Returns those of the named components that a folder with this index holds.

    Raises:
        CheckpointError: A component was not saved that every pipeline of the family needs.
    """
    absent = [name for name in names if index.get(name, _NOT_SAVED) == _NOT_SAVED]
    if needed := [name for name in absent if name not in family.optional_components]:
        raise CheckpointError(f"{_INDEX} must name the class of {needed[0]}, got none; save the checkpoint with all its parts.")
    return [name for name in names if name not in absent]


def _component(folder: Path, name: str) -> Path:
    component = folder / name
    if not component.is_dir():
        raise CheckpointError(f"{folder} must hold a folder {name}, got none; copy the whole checkpoint.")
    return component


def _check_tokenizer(component: Path) -> None:
    if not any(all((component / file).is_file() for file in files) for files in _VOCABULARIES):
        raise CheckpointError(f"{component} must hold a vocabulary, got no tokenizer.json; copy the whole checkpoint.")


def _check_module(component: Path, name: str) -> Mapping[str, str]:
    """Checks that a module's files are complete; returns the dtypes of its stored tensors by name."""
    _check_config(component, name)
    dtypes = _stored_dtypes(component, _stems(name))
    path = component / "config.json"
    _check_layers(path, read_json(path, f"{component} must have a configuration"), len(dtypes))
    return dtypes


def _check_layers(path: Path, config: Mapping[str, Any], num_tensors: int) -> None:
    """Refuses more layers than there are stored tensors: the libraries would build all of them before they look at the files.

    Raises:
        CheckpointError: A number of layers, or the length of a list, is absurd.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(path, value, num_tensors)
        counts = value if isinstance(value, list) else [value]
        is_absurd = len(counts) > _MOST_ITEMS or (
            _LAYERS.search(key) and any(type(count) is int and count > max(num_tensors, _MOST_LAYERS) for count in counts)
        )
        if is_absurd:
            got = f"{key[:80]} = {json.dumps(value)[:80]} for {num_tensors} stored tensors"
            raise CheckpointError(f"{path} must describe the model of the files beside it, got {got}; copy it again.")


def _stems(name: str) -> tuple[str, ...]:
    """Returns the names that a component's files may begin with: transformers' for a text encoder, otherwise diffusers'."""
    return tuple(stem for stem in WEIGHT_STEMS if (stem == TEXT_STEM) == name.startswith("text_encoder"))


def _check_config(component: Path, name: str) -> None:
    """Refuses a component if its library would silently load something other than the floats in its files."""
    path = component / "config.json"
    config = read_json(path, f"{component} must have a configuration")
    # The configurations of parts are also checked, for example that of a text model in a vision-language model.
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _REDIRECTIONS:
            if part.get(key):
                raise UnsupportedModelError(
                    f"{path} must be of a model in plain floats, got {key} = {json.dumps(part[key])[:100]}; {_SAVE_FLOATS}."
                )
    if name.startswith("text_encoder") and (component / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{component} must hold a model without an adapter, which transformers would add to it, got adapter_config.json; "
            "merge the adapter, or remove it."
        )


def _stored_dtypes(component: Path, stems: tuple[str, ...]) -> dict[str, str]:
    """Returns the dtypes of a component's tensors, by name.

    Raises:
        CheckpointError: A name is in several files, a dtype is one that no weight has, or the index does not fit the files.
    """
    dtypes: dict[str, str] = {}
    for file in weight_files(component, stems):
        with TensorFile(component / file) as tensors:
            for tensor in tensors.stored:
                if tensor.name in dtypes:
                    raise CheckpointError(
                        f"{component} must hold every weight once, got {tensor.name} in several files; save it again."
                    )
                if tensor.dtype not in (*_FLOATS, *_INTEGERS):
                    raise CheckpointError(
                        f"{component / file} must hold {tensor.name} in one of {', '.join(_FLOATS)}, got {tensor.dtype}; "
                        f"{_SAVE_FLOATS}."
                    )
                dtypes[tensor.name] = tensor.dtype
    chosen = chosen_file(component, stems).path
    # diffusers trusts the index: it would ignore a tensor that the index lacks, and look in vain for one that no file has.
    if chosen.suffix == ".json" and (differing := weight_map(component, chosen).keys() ^ dtypes.keys()):
        raise CheckpointError(
            f"{chosen} must list the tensors of its files, got a difference in {some_of(differing)}; save the checkpoint again."
        )
    return dtypes
