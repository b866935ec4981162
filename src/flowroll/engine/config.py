"""What an engine is started with, resolved once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flowroll.errors import InvalidRequestError
from flowroll.families import Defaults
from flowroll.types import Layout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_pixels: Height times width of a sample.
        max_steps: Denoising steps.
        max_outputs: Samples of one request.
        max_answer_bytes: Image, debug and trajectory tensors of one request, held until its answer is sent.
        max_scores: Recorded steps that one request may have scored again.
    """

    max_pixels: int = 2048 * 2048
    max_steps: int = 1000
    max_outputs: int = 64
    max_answer_bytes: int = 16 * 2**30
    max_scores: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """How many LoRA adapters an engine holds.

    Attributes:
        max_adapters: At once.
        max_adapter_bytes: Of all of them on rank 0, the weights of merged ones included.

    Raises:
        InvalidRequestError: A negative number.
    """

    max_adapters: int = 16
    max_adapter_bytes: int = 8 * 2**30

    def __post_init__(self) -> None:
        for name in ("max_adapters", "max_adapter_bytes"):
            if getattr(self, name) < 0:
                raise InvalidRequestError(f"{name} must be >= 0, got {getattr(self, name)}; use 0 for no adapters.", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine runs: every "auto" is a value here.

    Attributes:
        model: The checkpoint folder.
        family: Name of the model family.
        variant: Its variant.
        pipeline: The diffusers pipeline class.
        dtype: Dtype of the weights, e.g. "bfloat16".
        device: Device, e.g. "cuda:0".
        parameters: Parameters of the transformer, those of all ranks together.
        layout: How it is spread over ranks.
        transformer_bytes: Of its weights, on this rank.
        limits: What a request may ask for.
        adapter_limits: How many adapters there may be.
        defaults: What a request leaves open.
        pixel_unit: Height and width must be multiples of this.
        versions: Of the libraries whose code shapes the bits.
    """

    model: str
    family: str
    variant: str
    pipeline: str
    dtype: str
    device: str
    parameters: int
    layout: Layout
    transformer_bytes: int
    limits: Limits
    adapter_limits: AdapterLimits
    defaults: Defaults
    pixel_unit: int
    versions: Mapping[str, str]


def resolve_device(device: str) -> torch.device:
    """The device by name; "auto" is CUDA where there is one.

    Raises:
        InvalidRequestError: No such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidRequestError(f"device must be auto, cpu, cuda or cuda:N, got {device}; use auto.", field="device")
    if resolved.type == "cpu":
        return resolved
    index, count = resolved.index or 0, torch.cuda.device_count()
    if index >= count:
        raise InvalidRequestError(
            f"device must be on this machine, got {device} of {count} CUDA devices; use another index, or cpu.", field="device"
        )
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype by name; "auto" is bfloat16 on an accelerator and float32 on the CPU.

    Raises:
        InvalidRequestError: Not a dtype that flowroll's promises cover.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise InvalidRequestError(f"dtype must be one of auto, {', '.join(_DTYPES)}, got {dtype}; use auto.", field="dtype")
    return _DTYPES[dtype]
