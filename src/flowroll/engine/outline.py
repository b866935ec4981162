"""What a checkpoint's configurations alone say: enough to check a request or a layout, with no weight in memory."""

from __future__ import annotations

import torch

from flowroll.engine.checkpoint import Checkpoint
from flowroll.engine.config import Limits
from flowroll.engine.loading import LoadedModel, build_model, empty_module
from flowroll.errors import CheckpointError, FlowrollError
from flowroll.parallel.linears import check_columns
from flowroll.parallel.shards import check_rows
from flowroll.types import Layout


def outline_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The model without memory for its weights: `plan_request` takes it, a forward does not.

    Args:
        checkpoint: From `examine_checkpoint`.
        device: Where the weights would be.
        dtype: Dtype that they would have.

    Raises:
        CheckpointError: The libraries cannot build it.
        UnsupportedModelError: A checkpoint of a kind that flowroll does not know.
    """
    import diffusers

    try:
        modules = {name: empty_module(checkpoint, name) for name in ("transformer", "vae")}
        # The pipeline's own arithmetic over the configurations is part of what a request is checked against.
        pipeline_class = getattr(diffusers, checkpoint.family.pipeline_class)
        others = (*checkpoint.family.text_encoders, *checkpoint.family.tokenizers, "scheduler")
        pipeline = pipeline_class(**modules, **dict.fromkeys(others))
        spec = checkpoint.family.spec(pipeline)
    except FlowrollError:
        raise
    except Exception as error:
        wanted = checkpoint.family.pipeline_class
        raise CheckpointError(
            f"{checkpoint.folder} must describe a {wanted}, got {error}; save the checkpoint again."
        ) from error
    return build_model(checkpoint, modules["transformer"], spec, device=device, dtype=dtype, mesh=None)


def check_layout(outline: LoadedModel, layout: Layout, limits: Limits) -> None:
    """Refuses degrees that do not fit a model, before any weight is loaded or any rank is started.

    Raises:
        InvalidRequestError: It names the degrees that fit.
    """
    check_columns(outline.transformer, outline.family.parallel_plan.columns, layout.tp)
    check_rows(layout.sp, limits.max_pixels // outline.spec.pixel_unit**2)
