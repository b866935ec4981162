"""What a run of the harness compares. Every value is checked here, before the first process is started."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowroll.engine import Limits, RequestPlan
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import resolve_device, resolve_dtype
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import plan_request
from flowroll.errors import InvalidRequestError
from flowroll.parallel.rendezvous import check_devices, torchrun_rank
from flowroll.sampling.dynamics import dynamics_named
from flowroll.types import Layout, Number, SamplingParams, SdeType

_SIZE = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """What the user asks for. `None` means "the family's default", or what fits the machine.

    Attributes:
        model: A diffusers checkpoint folder.
        layouts: Names, separated by commas.
        modes: Dynamics, separated by commas.
        prompt: The text.
        seed: Of the first sample.
        noise_level: Of sde and cps.
        size: `WxH` or one number, in pixels.
        steps: Denoising steps.
        guidance_scale: Guidance scale.
        num_outputs: Samples.
        variant: Variant of the model family.
        dtype: "auto", "float32" or "bfloat16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads of each rank.
        rank_timeout_s: How long ranks wait for each other.
    """

    model: Path
    layouts: str
    modes: str
    prompt: str
    seed: int = 0
    noise_level: Number = 0.7
    size: str | None = None
    steps: int | None = None
    guidance_scale: Number | None = None
    num_outputs: int = 1
    variant: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    rank_timeout_s: Number = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityPlan:
    """A run whose values are known to fit the checkpoint and this machine.

    Attributes:
        model: The checkpoint folder.
        variant: Variant of the model family.
        dtype: Of the weights, e.g. "bfloat16".
        device: Of rank 0, e.g. "cuda:0".
        layouts: What is compared with one rank.
        requests: By mode, what every layout runs.
        request: One mode's request with every default filled in; the modes differ in their dynamics alone.
        num_threads: CPU threads of each rank.
        rank_timeout_s: How long ranks wait for each other.
    """

    model: Path
    variant: str
    dtype: str
    device: str
    layouts: tuple[Layout, ...]
    requests: Mapping[SdeType, SamplingParams]
    request: RequestPlan
    num_threads: int
    rank_timeout_s: Number


def plan_parity(options: ParityOptions) -> ParityPlan:
    """Checks every value, against the checkpoint and this machine too; starts nothing and loads no weight.

    Raises:
        InvalidRequestError: A value breaks its rule, or a layout does not fit.
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
    """
    layouts, modes = parse_layouts(options.layouts), parse_modes(options.modes)
    num_threads = _num_threads(options.threads, layouts)
    _check_timeout(options.rank_timeout_s)
    requests = _requests(options, modes)
    if torchrun_rank() is not None:
        raise InvalidRequestError("parity must be run as one process, got a process of torchrun; start it without torchrun.")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    checkpoint = examine_checkpoint(options.model, variant=options.variant)
    limits = Limits()
    outline = outline_model(checkpoint, device=device, dtype=dtype)
    plans = [plan_request(params, outline, limits) for params in requests.values()]
    for layout in layouts:
        check_devices(layout, device, torch.cuda.device_count())
        check_layout(outline, layout, limits)
    return ParityPlan(
        model=options.model,
        variant=checkpoint.variant,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        layouts=layouts,
        requests=requests,
        request=plans[0],
        num_threads=num_threads,
        rank_timeout_s=options.rank_timeout_s,
    )


def parse_layouts(text: str) -> tuple[Layout, ...]:
    """The layouts of a list such as "sp2,cfg2"; "single" compares one rank with itself.

    Raises:
        InvalidRequestError: One is no layout, or is there twice.
    """
    layouts = tuple(Layout.parse(name.strip()) for name in text.split(","))
    _refuse_repeats("layouts", [layout.name for layout in layouts])
    return layouts


def parse_modes(text: str) -> tuple[SdeType, ...]:
    """The dynamics of a list such as "sde,ode".

    Raises:
        InvalidRequestError: One is no dynamics, or is there twice.
    """
    modes = [dynamics_named(name.strip(), field="modes").name for name in text.split(",")]
    _refuse_repeats("modes", modes)
    return tuple(modes)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of `WxH`, or of one number for a square.

    Raises:
        InvalidRequestError: It is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError(
            f"size must be WIDTHxHEIGHT or one number of pixels, got {text!r}; write e.g. 1024x768 or 1024.", field="size"
        )
    return int(match[1]), int(match[2] or match[1])


def _refuse_repeats(field: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InvalidRequestError(f"{field} must name each one once, got {repeated[0]} twice; remove one.", field=field)


def _num_threads(threads: int | None, layouts: tuple[Layout, ...]) -> int:
    """As given, or an equal share of the cores for every rank of the largest layout. All ranks must have as many."""
    if threads is None:
        return max(1, (os.cpu_count() or 1) // max(layout.num_ranks for layout in layouts))
    if threads < 1:
        raise InvalidRequestError(f"threads must be at least 1, got {threads}; use 1.", field="threads")
    return threads


def _check_timeout(seconds: Number) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequestError(
            f"rank_timeout_s must be a number of seconds above 0, got {seconds:g}; use e.g. 60.", field="rank_timeout_s"
        )


def _requests(options: ParityOptions, modes: tuple[SdeType, ...]) -> dict[SdeType, SamplingParams]:
    width, height = (None, None) if options.size is None else parse_size(options.size)
    # By its short name, which is that of the option: an error names it so.
    given: dict[str, Any] = {"noise_level": options.noise_level}
    return {
        mode: SamplingParams(
            prompt=options.prompt,
            seed=options.seed,
            width=width,
            height=height,
            num_inference_steps=options.steps,
            num_outputs_per_prompt=options.num_outputs,
            guidance_scale=options.guidance_scale,
            rollout_sde_type=mode,
            rollout_debug_mode=True,
            rollout_return_denoising_env=True,
            rollout_return_dit_trajectory=True,
            **given,
        )
        for mode in modes
    }
