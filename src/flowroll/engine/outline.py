"""What a checkpoint's configurations alone say: enough to check a request, with no weight in memory."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from flowroll.engine.checkpoint import Checkpoint
from flowroll.engine.loading import LoadedModel, build_model
from flowroll.errors import CheckpointError, FlowrollError


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
    try:
        modules = {name: _empty(checkpoint, name) for name in ("transformer", "vae")}
        # The pipeline's own arithmetic over the configurations is part of what a request is checked against.
        pipeline_class = getattr(diffusers, checkpoint.family.pipeline_class)
        pipeline = pipeline_class(scheduler=None, text_encoder=None, tokenizer=None, **modules)
        spec = checkpoint.family.spec(pipeline)
    except FlowrollError:
        raise
    except Exception as error:
        wanted = checkpoint.family.pipeline_class
        raise CheckpointError(
            f"{checkpoint.folder} must describe a {wanted}, got {error}; save the checkpoint again."
        ) from error
    return build_model(checkpoint, modules["transformer"], spec, device=device, dtype=dtype, mesh=None)


def _empty(checkpoint: Checkpoint, component: str) -> Any:
    model_class = getattr(diffusers, checkpoint.class_of(component))
    with init_empty_weights():
        return model_class.from_config(model_class.load_config(checkpoint.folder / component))
