"""What a comparison runs. Every value is checked here, before the first process is started."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flowroll.engine import Limits, RequestPlan
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import resolve_device, resolve_dtype
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import plan_request
from flowroll.errors import InvalidRequestError
from flowroll.parallel.rendezvous import check_devices, torchrun_rank
from flowroll.sampling.dynamics import dynamics_named
from flowroll.types import Layout, Number, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityPlan:
    """A comparison whose values are known to fit the checkpoint and this machine.

    Attributes:
        model: The checkpoint folder.
        variant: Variant of the model family.
        dtype: Dtype of the weights, e.g. "bfloat16".
        device: Device of rank 0, e.g. "cuda:0".
        layouts: What is compared with one rank.
        requests: What every layout runs, by dynamics.
        request: One of these with every default filled in.
        num_threads: CPU threads of each rank.
        rank_timeout_s: How long ranks wait for each other.
    """

    model: Path
    variant: str
    dtype: str
    device: str
    layouts: tuple[Layout, ...]
    requests: Mapping[str, SamplingParams]
    request: RequestPlan
    num_threads: int
    rank_timeout_s: Number


def plan_parity(
    model: Path,
    params: SamplingParams,
    *,
    layouts: str,
    modes: str,
    variant: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    rank_timeout_s: Number = 60.0,
) -> ParityPlan:
    """Checks every value, against the checkpoint and this machine too; starts nothing and loads no weight.

    Args:
        model: A diffusers checkpoint folder.
        params: The request; everything is recorded, whatever it asks for.
        layouts: Names of layouts, separated by commas; "single" compares one rank with itself.
        modes: Dynamics, separated by commas.
        variant: Variant of the model family.
        dtype: "auto", "float32" or "bfloat16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads of each rank; None: the cores, divided by the ranks of the largest layout.
        rank_timeout_s: How long ranks wait for each other.

    Raises:
        InvalidRequestError: A value breaks its rule, or a layout does not fit.
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
    """
    chosen = tuple(Layout.parse(name.strip()) for name in layouts.split(","))
    _check_once("layouts", [layout.name for layout in chosen])
    names = [dynamics_named(name.strip(), field="modes").name for name in modes.split(",")]
    _check_once("modes", names)
    _check(threads is None or threads >= 1, "threads", "be at least 1", threads, "use 1")
    ok = math.isfinite(rank_timeout_s) and rank_timeout_s > 0
    _check(ok, "rank_timeout_s", "be a number of seconds above 0", f"{rank_timeout_s:g}", "use e.g. 60")
    _check(torchrun_rank() is None, "parity", "be run as one process", "a process of torchrun", "start it without torchrun")
    everything = replace(params, rollout_debug_mode=True, rollout_return_denoising_env=True, rollout_return_dit_trajectory=True)
    requests = {name: replace(everything, rollout_sde_type=name) for name in names}
    place = resolve_device(device)
    weights = resolve_dtype(dtype, place)
    checkpoint = examine_checkpoint(model, variant=variant)
    outline, limits = outline_model(checkpoint, device=place, dtype=weights), Limits()
    plans = [plan_request(request, outline, limits) for request in requests.values()]
    for layout in chosen:
        check_devices(layout, place, torch.cuda.device_count())
        check_layout(outline, layout, limits)
    return ParityPlan(
        model=model,
        variant=checkpoint.variant,
        dtype=str(weights).removeprefix("torch."),
        device=str(place),
        layouts=chosen,
        requests=requests,
        request=plans[0],
        num_threads=threads or max(1, (os.cpu_count() or 1) // max(layout.num_ranks for layout in chosen)),
        rank_timeout_s=rank_timeout_s,
    )


def _check_once(field: str, names: list[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    _check(repeated is None, field, "name each one once", f"{repeated} twice", "remove one")


def _check(ok: bool, field: str, rule: str, value: object, remedy: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{field} must {rule}, got {value}; {remedy}.", field=field)
