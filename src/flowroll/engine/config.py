"""The configuration of an engine, which is resolved once, at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from flowroll.errors import InvalidRequestError
from flowroll.exact import Certificate, GraphedForwards, recorder_for
from flowroll.families import Defaults
from flowroll.types import Exactness, Layout

Graphs: TypeAlias = Literal["auto", "off"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one request.

    Attributes:
        max_pixels: The largest height times width of a sample, in pixels.
        max_steps: The largest number of denoising steps.
        max_outputs: The largest number of samples.
        max_answer_bytes: The most bytes of image, debug and trajectory tensors, which are held until the answer is sent.
        max_scores: The largest number of recorded steps whose log-probs one request may have recomputed.
        max_images: The largest number of reference images.
        max_image_pixels: The largest height times width of a reference image, in pixels.
        max_image_bytes: The most bytes of the files of all reference images together.
        max_hashed_bytes: The most bytes that a transformer may have for its checksum to be computed at the start and after
            each update, which takes about a second per GiB, so that every rollout carries it. A larger one's is in the
            rollouts once somebody has asked for it.
    """

    max_pixels: int = 2048 * 2048
    max_steps: int = 1000
    max_outputs: int = 64
    max_answer_bytes: int = 16 * 2**30
    max_scores: int = 4096
    max_images: int = 16
    max_image_pixels: int = 4096 * 4096
    max_image_bytes: int = 64 * 2**20
    max_hashed_bytes: int = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """The limits of the LoRA adapters and policies that an engine holds.

    Attributes:
        max_adapters: The largest number of adapters at the same time.
        max_adapter_bytes: The most bytes of all adapters on rank 0, including the weights of merged ones.
        max_policies: The largest number of policies at the same time, beside the default. One of whole weights takes up to
            four bytes a parameter of the host's memory.

    Raises:
        InvalidRequestError: A limit is negative.
    """

    max_adapters: int = 16
    max_adapter_bytes: int = 8 * 2**30
    max_policies: int = 4

    def __post_init__(self) -> None:
        for name in ("max_adapters", "max_adapter_bytes", "max_policies"):
            if getattr(self, name) < 0:
                raise InvalidRequestError(f"{name} must be >= 0, got {getattr(self, name)}; use 0 for none.", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """How far the fast mode was from the exact one at the start, with the weights of the start.

    The exact engine rolled out some samples of a fixed prompt, each alone. The log-prob of every recorded step was then
    computed again in the fast mode, all samples together; the ratio is exp(fast - exact).

    Attributes:
        num_samples: The number of samples.
        num_steps: The number of stochastic steps of each.
        height: The height of the samples in pixels.
        width: The width of the samples in pixels.
        max_log_prob_by_step: The largest |difference| of a log-prob at each of these steps.
        max_log_prob: The largest |difference| of a log-prob.
        mean_log_prob: The mean |difference| of the log-probs.
        max_ratio: The largest |ratio - 1|.
        mean_ratio: The mean |ratio - 1|.
    """

    num_samples: int
    num_steps: int
    height: int
    width: int
    max_log_prob_by_step: tuple[float, ...]
    max_log_prob: float
    mean_log_prob: float
    max_ratio: float
    mean_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FastMode:
    """What makes an engine fast and not exact, and how far off it is.

    Attributes:
        parts: What is turned on, with the name of what was chosen, e.g. ("batch", "attention=sage").
        mismatch: What was measured at the start; other weights have other figures.
    """

    parts: tuple[str, ...]
    mismatch: Mismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Describes what an engine runs, with a value in place of every "auto".

    Attributes:
        model: The checkpoint folder.
        family: The name of the model family.
        variant: The variant of the family.
        pipeline: The name of the diffusers pipeline class.
        dtype: The dtype of the weights, e.g. "bfloat16".
        device: The device, e.g. "cuda:0".
        parameters: The number of parameters of the transformer, on all ranks together.
        layout: How the transformer is distributed over ranks.
        transformer_bytes: The number of bytes of the transformer's weights on this rank.
        limits: The limits of one request.
        adapter_limits: The limits of the LoRA adapters.
        defaults: The default values of a request.
        pixel_unit: The number of pixels that height and width must be multiples of.
        max_images: The most reference images of a request, which then has at least one; 0: it has none.
        versions: The versions of the libraries whose code the bits depend on, by name.
        compiled: The name of the kernels that torch made of the transformer's blocks; None where they run eagerly.
        graphs: Whether forwards of small samples are recorded as CUDA graphs. A replay runs the kernels of an eager forward.
        max_graph_bytes: The most memory that recordings take.
        certificate: The kernels, and what they were found to do with the shapes of this model.
        exactness: "exact", or "fast" for an engine whose samples need not have the bits that they have alone.
        fast: What makes it fast, and how far it is from exact; None for an exact engine.
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
    max_images: int
    versions: Mapping[str, str]
    compiled: str | None = None
    graphs: Literal["on", "off"] = "off"
    max_graph_bytes: int = 0
    certificate: Certificate
    exactness: Exactness = "exact"
    fast: FastMode | None = None


def resolve_device(device: str) -> torch.device:
    """Returns the device with this name; "auto" is CUDA if it is available, otherwise the CPU.

    Raises:
        InvalidRequestError: This machine has no such device.
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
    """Returns the dtype with this name; "auto" is bfloat16 on an accelerator and float32 on the CPU.

    Raises:
        InvalidRequestError: flowroll's promises do not cover the dtype.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise InvalidRequestError(f"dtype must be one of auto, {', '.join(_DTYPES)}, got {dtype}; use auto.", field="dtype")
    return _DTYPES[dtype]


def resolve_graphs(
    graphs: str, max_graph_bytes: int, *, device: torch.device, layout: Layout, compile: bool
) -> GraphedForwards | None:
    """Returns what records forwards and replays them; None where every forward runs eagerly.

    "auto" is on for CUDA with one rank and eager kernels: a recording with collectives in it, and what compiled blocks read,
    were not looked at.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """
    if graphs not in ("auto", "off"):
        raise InvalidRequestError(f"graphs must be auto or off, got {graphs}; use auto.", field="graphs")
    if max_graph_bytes < 0:
        raise InvalidRequestError(
            f"max_graph_bytes must be >= 0, got {max_graph_bytes}; use graphs off for none.", field="max_graph_bytes"
        )
    if graphs == "off" or layout.num_ranks > 1 or compile or (recorder := recorder_for(device)) is None:
        return None
    return GraphedForwards(recorder, max_bytes=max_graph_bytes)
