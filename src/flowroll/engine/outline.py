"""Builds a model from a checkpoint's configurations alone, to check requests and layouts without weights in memory."""

from __future__ import annotations

import inspect

import torch

from flowroll.engine.checkpoint import Checkpoint
from flowroll.engine.config import Limits
from flowroll.engine.loading import LoadedModel, build_model, empty_module, load_processors
from flowroll.errors import CheckpointError, FlowrollError, InvalidRequestError
from flowroll.exact import check_shards, has_amx
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
        InvalidRequestError: A degree does not fit; the error names the degrees that fit. Or ranks would have other bits than
            one rank: parts of the model's products, attention or means were found to have them, or oneDNN would choose kernels
            by the number of rows and columns.
    """
    # AMX is refused by its name, not only by what is measured: its kernels change at numbers of rows that nobody has listed.
    if layout.num_ranks > 1 and outline.device.type == "cpu" and outline.dtype != torch.float32 and has_amx():
        raise InvalidRequestError(
            "dtype must be float32 for several ranks on a CPU with AMX, whose bfloat16 products of a part differ from those of "
            f"the whole, got {str(outline.dtype).removeprefix('torch.')}; set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 for the "
            "engine and for whoever replays its rollouts.",
            field="dtype",
        )
    columns = outline.family.parallel_plan.columns
    check_columns(outline.transformer, columns, layout.tp)
    check_rows(layout.sp, limits.max_pixels // outline.spec.pixel_unit**2)
    check_shards(outline.transformer, layout, columns, device=outline.device, dtype=outline.dtype)
