"""Loads a checked checkpoint: the whole pipeline, or the part of the transformer that one rank holds."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from flowroll.engine.adapters.adapter_set import AdapterSet
from flowroll.engine.checkpoint import Checkpoint, plain_class
from flowroll.engine.facts import ModelFacts, TokenizerFacts
from flowroll.engine.images import blank_image, open_images
from flowroll.engine.runner.streams import Streams
from flowroll.engine.scratch import scratch_folder
from flowroll.engine.templates import check_chat_template
from flowroll.engine.tokens import listen
from flowroll.engine.weights.files import read_json
from flowroll.errors import CheckpointError, FlowrollError
from flowroll.exact import (
    GraphedForwards,
    Modulations,
    Strategy,
    all_ranks_agree,
    choose_strategy,
    compile_blocks,
    is_compiled,
    run_on_groups,
)
from flowroll.families import Family, ModelSpec
from flowroll.families.alignment import align_weights
from flowroll.families.conditioning import TOKENS
from flowroll.parallel.linears import ColumnParallelLinear, shard_columns_of
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.regions import shard_rows_of
from flowroll.processors import without_videos
from flowroll.types import all_finite

_PROBE = "a red circle"
# Where the layers that modulate cost more than what is saved of them: of Qwen-Image, 4.4 MB a timestep.
_KEEP_MODULATIONS = frozenset({"cuda"})
_MODULATION_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(ModelFacts):
    """The parts of a loaded checkpoint that planning and denoising need.

    Attributes:
        transformer: The denoiser, or this rank's part of it.
        adapters: The transformer with LoRA adapters.
        strategy: Computes the velocities of samples that take a step together.
        streams: The streams of its device.
    """

    transformer: Any
    adapters: AdapterSet
    strategy: Strategy
    streams: Streams


def silence_model_libraries() -> None:
    """Imports diffusers and transformers, and turns off their progress bars."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None = None,
    compile: bool = False,
    graphs: GraphedForwards | None = None,
) -> tuple[LoadedModel, Any]:
    """Loads the checkpoint into memory.

    Args:
        checkpoint: The checkpoint, from `examine_checkpoint`.
        device: The device for the modules.
        dtype: The dtype of all modules.
        mesh: The collectives of the ranks that share the transformer; None: this rank holds all of it.
        compile: Whether the transformer's blocks run compiled.
        graphs: Records forwards of small samples and replays them.

    Returns:
        The model, and the diffusers pipeline that holds the modules.

    Raises:
        CheckpointError: The libraries cannot load the checkpoint.
        UnsupportedModelError: The checkpoint is of a kind that flowroll does not know.
    """
    try:
        pipeline = _load_pipeline(checkpoint, dtype, mesh)
        pipeline.to(device)
        spec = checkpoint.family.spec(pipeline)
        tokenizers = _check_text(checkpoint, pipeline, spec)
    except FlowrollError:
        raise
    except Exception as error:
        raise _unloadable(checkpoint, error) from error
    if compile:
        compile_blocks(pipeline.transformer)
    model = build_model(
        checkpoint,
        pipeline.transformer,
        spec,
        device=device,
        dtype=dtype,
        mesh=mesh,
        tokenizers=tokenizers,
        graphs=graphs,
    )
    return model, pipeline


def build_model(
    checkpoint: Checkpoint,
    transformer: Any,
    spec: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None,
    tokenizers: tuple[TokenizerFacts, ...] = (),
    graphs: GraphedForwards | None = None,
) -> LoadedModel:
    """Makes the model of a loaded transformer, with its adapters and its strategy."""
    over_ranks: dict[str, Any] = {}
    if mesh is not None:
        over_ranks = {"run": functools.partial(run_on_groups, mesh), "agree": functools.partial(all_ranks_agree, mesh)}
    return LoadedModel(
        family=checkpoint.family,
        variant=checkpoint.variant,
        transformer=transformer,
        adapters=AdapterSet(transformer),
        # No function mode may be active in a compiled block, nor in a forward that is recorded.
        strategy=choose_strategy(
            checkpoint.family,
            device=device,
            dtype=dtype,
            name="alone" if is_compiled(transformer) or graphs is not None else None,
            graphs=graphs,
            with_programs=True,
            modulations=None if mesh is not None or is_compiled(transformer) else _modulations(checkpoint.family, device),
            **over_ranks,
        ),
        streams=Streams(device),
        spec=spec,
        schedule_config=checkpoint.schedule_config,
        device=device,
        dtype=dtype,
        tokenizers=tokenizers,
    )


def _modulations(family: Family, device: torch.device) -> Modulations | None:
    if device.type not in _KEEP_MODULATIONS or not family.modulation:
        return None
    return Modulations(family.modulation, family.conditioning.timestep, max_bytes=_MODULATION_BYTES)


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, mesh: Mesh | None) -> nn.Module:
    """Loads the transformer in evaluation mode, on the CPU: all of it, or this rank's part.

    Raises:
        CheckpointError: The libraries cannot load the transformer, or its files lack a weight.
    """
    plan = checkpoint.family.parallel_plan
    try:
        if mesh is None or mesh.degree("tp") == 1:
            transformer = load_component(checkpoint, "transformer", dtype)
        else:
            transformer = empty_module(checkpoint, "transformer")
            shard_columns_of(transformer, plan.columns, mesh)
            checkpoint.check_stored("transformer", transformer)
            _load_shards(checkpoint, transformer, dtype)
            checkpoint.check_finite("transformer", transformer)
    except FlowrollError:
        raise
    except Exception as error:
        raise _unloadable(checkpoint, error) from error
    if mesh is not None:
        shard_rows_of(transformer, plan, mesh)
    # Not frozen: for some products, torch picks another kernel if the weight needs no gradient, and the weights of a pipeline,
    # like a trainer's, need one. No graph is recorded here in any case.
    return transformer.eval()  # type: ignore[no-any-return]


def load_component(checkpoint: Checkpoint, component: str, dtype: torch.dtype) -> Any:
    """Loads a component with its library, whose report tells which tensors of the files found no place.

    Raises:
        CheckpointError: A weight is missing, or a tensor does not belong to the class.
    """
    import diffusers
    import transformers

    library: Any = transformers if component.startswith("text_encoder") else diffusers
    # By default transformers asks on standard input whether code in the folder may run; diffusers' model classes run none.
    options = {"trust_remote_code": False} if library is transformers else {}
    module, report = getattr(library, checkpoint.class_of(component)).from_pretrained(
        checkpoint.folder / component,
        dtype=dtype,
        variant=checkpoint.weights_variant(component),
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    unknown = set(report["unexpected_keys"])
    if unknown and library is transformers:
        unknown -= _tensors_of_saver(checkpoint, component, module)
    checkpoint.check_loaded(component, module, missing=report["missing_keys"], unknown=unknown)
    checkpoint.check_finite(component, module)
    # Weights that are mapped from a file are aligned according to the length of its header, and bits would depend on that.
    align_weights(module)
    return module


def _tensors_of_saver(checkpoint: Checkpoint, component: str, module: Any) -> set[str]:
    """Returns the tensor names of the class that a text encoder was saved from.

    The pipeline's class intentionally leaves out that class's head.
    """
    config = read_json(checkpoint.folder / component / "config.json", f"{component} must have a configuration")
    import transformers
    from accelerate import init_empty_weights

    saver = getattr(transformers, plain_class(str((config.get("architectures") or [""])[0])), None)
    if saver is None or not isinstance(module.config, saver.config_class):
        return set()
    with init_empty_weights(include_buffers=False):
        return set(saver(module.config).state_dict())


def empty_module(checkpoint: Checkpoint, component: str) -> Any:
    """Builds a component of the pipeline without memory for its weights."""
    import diffusers
    from accelerate import init_empty_weights

    model_class = getattr(diffusers, checkpoint.class_of(component))
    with init_empty_weights(include_buffers=False):
        return model_class.from_config(model_class.load_config(checkpoint.folder / component))


def _load_shards(checkpoint: Checkpoint, transformer: nn.Module, dtype: torch.dtype) -> None:
    """Fills the transformer from its files; of a sharded weight, only this rank's columns are read."""
    expected = set(transformer.state_dict())
    for file in checkpoint.weight_files("transformer"):
        with safe_open(file, framework="pt") as weights:
            # Tensors that the class ignores are in the file, but not in the module.
            for name in sorted(expected.intersection(weights.keys())):
                path, _, leaf = name.rpartition(".")
                owner = transformer.get_submodule(path)
                empty = getattr(owner, leaf)
                stored = weights.get_slice(name)
                sharded = isinstance(owner, ColumnParallelLinear)
                tensor = stored[owner.own_columns] if sharded else stored[:]
                if tensor.shape != empty.shape:
                    raise CheckpointError(
                        f"{file} must hold {name} as {list(empty.shape)}, got {list(tensor.shape)}; save it again."
                    )
                whole = tensor.to(dtype, copy=True)
                setattr(owner, leaf, whole if leaf in owner._buffers else nn.Parameter(whole))


def _load_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, mesh: Mesh | None) -> Any:
    """Loads the pipeline in evaluation mode, on the CPU."""
    import diffusers

    modules = {
        name: load_transformer(checkpoint, dtype, mesh) if name == "transformer" else load_component(checkpoint, name, dtype)
        for name in checkpoint.modules
    }
    parts = {**modules, **_tokenizers(checkpoint), **dict.fromkeys(checkpoint.absent)}
    # The class itself: `DiffusionPipeline` would load the components that it does not know to be optional.
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    with _with_plain_classes(checkpoint, parts) as folder:
        pipeline = pipeline_class.from_pretrained(folder, **parts, dtype=dtype, local_files_only=True, trust_remote_code=False)
    pipeline.set_progress_bar_config(disable=True)
    for module in modules.values():
        module.eval()
    return pipeline


def _tokenizers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Loads the tokenizers. diffusers would leave it to transformers' default whether code in their folders may run.

    Where a processor was saved whose class needs a library that is not installed, the tokenizer of its folder is loaded, which
    makes the same tokens of a text.
    """
    import transformers

    found = load_processors(checkpoint)
    for name in checkpoint.tokenizers:
        if name not in found:
            is_unloadable = _is_unloadable(checkpoint, name)
            kind = transformers.AutoTokenizer if is_unloadable else getattr(transformers, checkpoint.class_of(name))
            found[name] = _load_plainly(kind, checkpoint.folder / name)
    return found


def load_processors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Loads the components that make tokens of texts and images. A pipeline may need them when it is built."""
    import transformers

    found = {}
    for name in checkpoint.tokenizers:
        kind = getattr(transformers, checkpoint.class_of(name))
        if issubclass(kind, transformers.ProcessorMixin):
            found[name] = _load_plainly(without_videos(kind), checkpoint.folder / name)
    return found


def _load_plainly(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _is_unloadable(checkpoint: Checkpoint, tokenizer: str) -> bool:
    """Tells whether the class of this component is neither a tokenizer's nor a processor's, as one that lacks a library is."""
    import transformers

    kinds = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
    return not issubclass(getattr(transformers, checkpoint.class_of(tokenizer)), kinds)


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """Returns the components of a pipeline that have weights, by name."""
    return {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}


@contextlib.contextmanager
def _with_plain_classes(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a folder whose index names the libraries' own classes, because diffusers imports the class of every component.

    It is the checkpoint's folder, unless that names the classes of a trainer's wrapper, or a processor in whose place `parts`
    has a tokenizer.
    """
    plain = {
        name: ["transformers" if name.startswith("text_encoder") else "diffusers", checkpoint.class_of(name)]
        for name in checkpoint.modules
    }
    processors = (name for name in checkpoint.tokenizers if _is_unloadable(checkpoint, name))
    plain |= {name: ["transformers", type(parts[name]).__name__] for name in processors}
    if all(checkpoint.index[name][1] == entry[1] for name, entry in plain.items()):
        yield checkpoint.folder
        return
    with scratch_folder() as folder:
        for path in checkpoint.folder.iterdir():
            if path.is_dir():
                (folder / path.name).symlink_to(path.resolve())
        (folder / "model_index.json").write_text(json.dumps({**checkpoint.index, **plain}))
        yield folder


def _check_text(checkpoint: Checkpoint, pipeline: Any, spec: ModelSpec) -> tuple[TokenizerFacts, ...]:
    """Encodes a test prompt, so that a broken tokenizer, template or text encoder shows here and not in the first request.

    For a family that edits images there is one beside it, which the VAE encodes.

    Returns:
        The facts about the tokenizers that this shows.
    """
    family = checkpoint.family
    for name in family.tokenizers:
        check_chat_template(name, getattr(pipeline, name, None), _PROBE)
    images = open_images([blank_image()] if spec.max_images else [])
    with torch.no_grad():
        encoded, tokenizers = listen(family, pipeline, checkpoint.variant, _PROBE, images)
        latents = family.encode_images(pipeline, images) if images else {}
    if not all(all_finite(value) for value in latents.values() if isinstance(value, torch.Tensor)):
        raise CheckpointError("vae must encode images as finite latents, got NaN or infinity; copy the weights again.")
    embeds = encoded[family.embeds_key]
    assert isinstance(embeds, torch.Tensor)
    names = " and ".join(name for name in family.text_encoders if getattr(pipeline, name) is not None)
    if not all(all_finite(value) for value in encoded.values() if isinstance(value, torch.Tensor)):
        raise CheckpointError(f"{names} must give finite embeddings, got NaN or infinity; copy the weights again.")
    if embeds.shape[0] < len(_PROBE.split()):
        raise CheckpointError(f"tokenizer must give a token per word, got {embeds.shape[0]} for {_PROBE!r}; copy it again.")
    for field in family.conditioning.fields:
        value = encoded.get(field.name)
        if not field.is_tensor or not isinstance(value, torch.Tensor):
            continue
        if list(value.shape) != (sizes := field.sizes({**spec.widths, TOKENS: embeds.shape[0]})):
            raise CheckpointError(
                f"{names} must give {field.name} of shape {sizes}, which the transformer takes, got {list(value.shape)}; save "
                "the transformer with the text encoders that it was trained with."
            )
    return tokenizers


def _unloadable(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    """Makes the error for an exception of the libraries, which is about content that the earlier checks could not reach."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    wanted = checkpoint.pipeline_class
    return CheckpointError(f"{checkpoint.folder} must load as {wanted}, got {reason}; save the checkpoint again.")
