"""Loads an examined checkpoint: the whole pipeline, or the part of the transformer that one rank holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from flowroll.engine.adapters import AdapterSet
from flowroll.engine.checkpoint import TORCH_COMPONENTS, Checkpoint
from flowroll.errors import CheckpointError, FlowrollError
from flowroll.families import Family, ModelSpec, RunCalls, run_in_turn
from flowroll.families.alignment import align_weights
from flowroll.parallel.branches import run_on_branches
from flowroll.parallel.linears import ColumnParallelLinear, shard_columns_of
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.regions import shard_rows_of
from flowroll.sampling.schedule import ScheduleConfig
from flowroll.types import all_finite

_PROBE = "a red circle"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What planning and denoising need of a checkpoint in memory.

    Attributes:
        family: How to call it.
        variant: Which of the family's variants it is taken for.
        transformer: The denoiser, or this rank's part of it.
        adapters: The same with LoRA adapters.
        run: Runs the forwards of a step.
        spec: The facts that shape its latents.
        schedule_config: Its sigma grid.
        device: Where the modules are.
        dtype: Of the weights.
    """

    family: Family
    variant: str
    transformer: Any
    adapters: AdapterSet
    run: RunCalls
    spec: ModelSpec
    schedule_config: ScheduleConfig
    device: torch.device
    dtype: torch.dtype


def load_model(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, mesh: Mesh | None = None
) -> tuple[LoadedModel, Any]:
    """Loads the checkpoint.

    Args:
        checkpoint: From `examine_checkpoint`.
        device: Where to put the modules.
        dtype: Dtype of all modules.
        mesh: The ranks that share the transformer; None: this one has all of it.

    Returns:
        The model, and the diffusers pipeline that holds the modules.

    Raises:
        CheckpointError: The libraries cannot load it.
        UnsupportedModelError: A checkpoint of a kind that flowroll does not know.
    """
    try:
        pipeline = _load_pipeline(checkpoint, dtype, mesh)
        checkpoint.check_complete("vae", pipeline.vae)
        pipeline.to(device)
        spec = checkpoint.family.spec(pipeline)
        _check_text(checkpoint.family, pipeline)
    except FlowrollError:
        raise
    except Exception as error:
        raise _unloadable(checkpoint, error) from error
    return build_model(checkpoint, pipeline.transformer, spec, device=device, dtype=dtype, mesh=mesh), pipeline


def build_model(
    checkpoint: Checkpoint, transformer: Any, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype, mesh: Mesh | None
) -> LoadedModel:
    """The model around a loaded transformer."""
    return LoadedModel(
        family=checkpoint.family,
        variant=checkpoint.variant,
        transformer=transformer,
        adapters=AdapterSet(transformer),
        run=run_in_turn if mesh is None else functools.partial(run_on_branches, mesh),
        spec=spec,
        schedule_config=checkpoint.schedule_config,
        device=device,
        dtype=dtype,
    )


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, mesh: Mesh | None) -> nn.Module:
    """The transformer in evaluation mode, on the CPU: all of it, or this rank's part.

    Raises:
        CheckpointError: The libraries cannot load it, or its files lack a weight.
    """
    model_class = getattr(diffusers, checkpoint.class_of("transformer"))
    folder = checkpoint.folder / "transformer"
    plan = checkpoint.family.parallel_plan
    try:
        if mesh is None or mesh.degree("tp") == 1:
            transformer = model_class.from_pretrained(folder, dtype=dtype, local_files_only=True)
            # Mapped from a file, they lie wherever its header's length puts them, and bits would depend on that.
            align_weights(transformer)
        else:
            transformer = empty_module(checkpoint, "transformer")
            shard_columns_of(transformer, plan.columns, mesh)
            checkpoint.check_complete("transformer", transformer)
            _load_shards(checkpoint, transformer, dtype)
    except FlowrollError:
        raise
    except Exception as error:
        raise _unloadable(checkpoint, error) from error
    checkpoint.check_complete("transformer", transformer)
    if mesh is not None:
        shard_rows_of(transformer, plan, mesh)
    # Not frozen: torch picks another kernel for some products whose weight needs no gradient, and a pipeline's weights, like a
    # trainer's, do. Nothing here records a graph.
    return transformer.eval()  # type: ignore[no-any-return]


def empty_module(checkpoint: Checkpoint, component: str) -> Any:
    """A component of the pipeline without memory for its weights."""
    model_class = getattr(diffusers, checkpoint.class_of(component))
    with init_empty_weights(include_buffers=False):
        return model_class.from_config(model_class.load_config(checkpoint.folder / component))


def _load_shards(checkpoint: Checkpoint, transformer: nn.Module, dtype: torch.dtype) -> None:
    """Fills the transformer from its files. Of a sharded weight, only this rank's columns are read."""
    for file in checkpoint.weight_files("transformer"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
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
                setattr(owner, leaf, nn.Parameter(tensor.to(dtype, copy=True)))


def _load_pipeline(checkpoint: Checkpoint, dtype: torch.dtype, mesh: Mesh | None) -> Any:
    """The pipeline in evaluation mode, on the CPU."""
    text_class = getattr(transformers, checkpoint.class_of("text_encoder"))
    text_encoder, report = text_class.from_pretrained(
        checkpoint.folder / "text_encoder", dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise checkpoint.incomplete("text_encoder", text_encoder, missing)
    transformer = load_transformer(checkpoint, dtype, mesh)
    pipeline = DiffusionPipeline.from_pretrained(
        checkpoint.folder, text_encoder=text_encoder, transformer=transformer, dtype=dtype, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    for name in TORCH_COMPONENTS:
        getattr(pipeline, name).eval()
    return pipeline


def _check_text(family: Family, pipeline: Any) -> None:
    """Encodes a prompt: a broken tokenizer, template or text encoder shows here and not in the first request."""
    with torch.no_grad():
        embeds = family.encode(pipeline, _PROBE)[family.embeds_key]
    assert isinstance(embeds, torch.Tensor)
    if not all_finite(embeds):
        raise CheckpointError("text_encoder must give finite embeddings, got NaN or infinity; copy its weights again.")
    if embeds.shape[0] < len(_PROBE.split()):
        raise CheckpointError(f"tokenizer must give a token per word, got {embeds.shape[0]} for {_PROBE!r}; copy it again.")


def _unloadable(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    """What the libraries raise is about this folder's content, which was looked at as far as it can be."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    wanted = checkpoint.family.pipeline_class
    return CheckpointError(f"{checkpoint.folder} must load as {wanted}, got {reason}; save the checkpoint again.")
