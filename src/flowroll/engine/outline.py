"""Builds a model from a checkpoint's configurations alone, to check requests and layouts without weights in memory."""

from __future__ import annotations

import inspect

import torch

from flowroll.engine.checkpoint import Checkpoint
from flowroll.engine.config import Limits
from flowroll.engine.loading import LoadedModel, build_model, empty_module, load_processors
from flowroll.errors import CheckpointError, FlowrollError
from flowroll.parallel.linears import check_columns
from flowroll.parallel.shards import check_rows
from flowroll.types import Layout


def outline_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Builds the model without memory for its weights. `plan_request` accepts it; it cannot run a forward.

    Args:
        checkpoint: The checkpoint, from `examine_checkpoint`.
        device: The device that the weights would be on.
        dtype: The dtype that the weights would have.

    Raises:
        CheckpointError: The libraries cannot build the model.
        UnsupportedModelError: The checkpoint is of a kind that flowroll does not know.
    """
    import diffusers

    try:
        modules = {name: empty_module(checkpoint, name) for name in ("transformer", "vae")}
        # Requests are also checked against values that the pipeline itself computes from the configurations.
        pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
        others = (*checkpoint.family.text_encoders, *checkpoint.family.tokenizers, "scheduler")
        taken = inspect.signature(pipeline_class.__init__).parameters
        options = {name: value for name, value in checkpoint.options.items() if name in taken}
        pipeline = pipeline_class(**{**options, **dict.fromkeys(others), **load_processors(checkpoint), **modules})
        spec = checkpoint.family.spec(pipeline)
    except FlowrollError:
        raise
    except Exception as error:
        wanted = checkpoint.pipeline_class
        raise CheckpointError(
            f"{checkpoint.folder} must describe a {wanted}, got {error}; save the checkpoint again."
        ) from error
    return build_model(checkpoint, modules["transformer"], spec, device=device, dtype=dtype, mesh=None)


def check_layout(outline: LoadedModel, layout: Layout, limits: Limits) -> None:
    """Refuses degrees that do not fit a model, before any weight is loaded or any rank is started.

    Raises:
        InvalidRequestError: A degree does not fit; the error names the degrees that fit.
    """
    check_columns(outline.transformer, outline.family.parallel_plan.columns, layout.tp)
    check_rows(layout.sp, limits.max_pixels // outline.spec.pixel_unit**2)
