"""Runs a plan: one rank first, then every layout, one engine after the other."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from flowroll.engine import Engine
from flowroll.errors import EngineError, FlowrollError
from flowroll.families import Geometry, Guidance
from flowroll.parity.compare import TensorParity, compare_rollouts
from flowroll.parity.plan import ParityPlan
from flowroll.types import Layout, Number, Rollout, SamplingParams

# The folders of an absolute path, which are no reader's business.
_FOLDERS = re.compile(r"(?<![\w./-])/(?:[^\s/'\"]+/)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutParity:
    """One layout against one rank.

    Attributes:
        layout: Its name.
        num_ranks: Its processes.
        transformer_bytes: Bytes of the transformer's weights on one rank.
        received_bytes: Bytes that rank 0 received a step, by mesh axis; the mean over steps, samples and modes.
        tensors: What was compared in the modes that ran to their end.
        error: Why not all modes ran to their end; None if all did.
    """

    layout: str
    num_ranks: int
    transformer_bytes: int
    received_bytes: Mapping[str, Number]
    tensors: tuple[TensorParity, ...]
    error: str | None = None

    @property
    def differing(self) -> tuple[TensorParity, ...]:
        """The tensors that are not equal."""
        return tuple(tensor for tensor in self.tensors if not tensor.whole.equal)

    @property
    def is_exact(self) -> bool:
        """Whether every tensor of every mode is equal; a layout that failed is not exact."""
        return self.error is None and not self.differing

    @property
    def idle_axes(self) -> tuple[str, ...]:
        """The mesh axes on which no byte moved: nothing was shared out there."""
        layout = Layout.parse(self.layout)
        axes = [axis for axis in ("sp", "cfg", "tp") if getattr(layout, axis) > 1]
        return tuple(axis for axis in axes if self.tensors and not self.received_bytes.get(axis))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """A whole comparison.

    Attributes:
        setting: What was run, on what and when, as names and values.
        modes: The dynamics.
        commands: The command lines that repeat it, by what they are for.
        one_rank: One rank, which the layouts are compared with; nothing was compared here.
        layouts: The layouts, in the order asked for.
    """

    setting: Mapping[str, str]
    modes: tuple[str, ...]
    commands: Mapping[str, str]
    one_rank: LayoutParity
    layouts: tuple[LayoutParity, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every layout is exact."""
        return all(layout.is_exact for layout in self.layouts)


def run_parity(plan: ParityPlan, *, on_layout: Callable[[LayoutParity], None]) -> ParityReport:
    """Runs one rank and every layout, and compares.

    Args:
        plan: The plan that `plan_parity` made.
        on_layout: Called with the result of each layout.

    Raises:
        EngineError: One rank failed: there is nothing to compare with.
    """
    expected: dict[str, list[Rollout]] = {}
    # The ranks that an engine starts have as many.
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.num_threads)
    try:
        one_rank, results = _run_layout(plan, Layout(), expected), []
        if one_rank.error is not None:
            raise EngineError(f"one rank must run before layouts are compared with it, got: {one_rank.error}")
        for layout in plan.layouts:
            results.append(_run_layout(plan, layout, dict(expected)))
            on_layout(results[-1])
    finally:
        torch.set_num_threads(threads)
    commands = {"this run": command_line(plan)}
    if plan.device == "cpu":
        gpus = {"size": "1024", "dtype": "bfloat16", "device": "cuda"}
        commands["the same at 1024 x 1024 on GPUs, one for each rank"] = command_line(plan, **gpus)
    return ParityReport(
        setting=_setting(plan), modes=tuple(plan.requests), commands=commands, one_rank=one_rank, layouts=tuple(results)
    )


def _run_layout(plan: ParityPlan, layout: Layout, expected: dict[str, list[Rollout]]) -> LayoutParity:
    """Runs every mode of one layout against what is expected; a mode of which nothing is expected is remembered there."""
    tensors: list[TensorParity] = []
    error, weights, received, steps = None, 0, {}, 0
    options = {"variant": plan.variant, "dtype": plan.dtype, "device": plan.device, "rank_timeout_s": plan.rank_timeout_s}
    try:
        with Engine(plan.model, layout=layout, **options) as engine:  # type: ignore[arg-type]
            weights = engine.info.transformer_bytes
            for mode, request in plan.requests.items():
                rollouts = engine.rollout(request)
                steps += plan.request.schedule.num_steps * len(rollouts)
                received = {axis: count / steps for axis, count in engine.received_bytes.items()}
                if mode in expected:
                    tensors += compare_rollouts(mode, expected[mode], rollouts)
                else:
                    expected[mode] = rollouts
    except Exception as failure:
        message = failure.message if isinstance(failure, FlowrollError) else f"{type(failure).__name__}: {failure}"
        error = _FOLDERS.sub("", message)
    return LayoutParity(
        layout=layout.name,
        num_ranks=layout.num_ranks,
        transformer_bytes=weights,
        received_bytes=received,
        tensors=tuple(tensors),
        error=error,
    )


def command_line(plan: ParityPlan, **changed: str) -> str:
    """Returns the command line that repeats a run, with every default filled in, on several lines.

    Args:
        plan: The run.
        **changed: Flags with another value than there.
    """
    params, request = next(iter(plan.requests.values())), plan.request
    assert params.prompt is not None
    size = f"{request.geometry.width}x{request.geometry.height}"
    place = {"size": size, "variant": plan.variant, "dtype": plan.dtype, "device": plan.device, **changed}
    lines: list[list[str]] = [
        ["flowroll", "parity", plan.model.resolve().name, "--layouts", ",".join(layout.name for layout in plan.layouts)],
        ["--modes", ",".join(plan.requests), "--prompt", params.prompt],
        ["--seed", str(params.seed), "--num-outputs", str(len(request.seeds)), "--noise-level", f"{params.noise_level:g}"],
        ["--steps", str(request.schedule.num_steps), *_guidance_flags(request.guidance, params)],
        [word for name, value in place.items() for word in (f"--{name}", value)],
    ]
    if not changed:
        lines[-1] += ["--threads", str(plan.num_threads)]
    return " \\\n    ".join(map(shlex.join, lines))


def _guidance_flags(guidance: Guidance, params: SamplingParams) -> list[str]:
    """Returns the flags of a run's scales, of its negative prompt if it was given one, and of its reference images."""
    flags = ["--guidance-scale", f"{guidance.scale if guidance.embedded is None else guidance.embedded:g}"]
    if params.true_cfg_scale is not None:
        flags += ["--true-cfg-scale", f"{params.true_cfg_scale:g}"]
    if params.negative_prompt is not None:
        flags += ["--negative-prompt", params.negative_prompt]
    return flags + [word for number in range(len(params.images or ())) for word in ("--images", f"image-{number}.png")]


def _references(geometry: Geometry) -> str:
    count = len(geometry.references)
    return f", and {geometry.num_reference_tokens} of {count} reference images" if count else ""


def _guidance_words(guidance: Guidance) -> str:
    words = f"{guidance.rule}, scale {guidance.scale:g}" if guidance.is_active else "none"
    return words if guidance.embedded is None else f"{words}; the model's own scale {guidance.embedded:g}"


def _setting(plan: ParityPlan) -> Mapping[str, str]:
    request, geometry, record = plan.request, plan.request.geometry, plan.request.record
    params = next(iter(plan.requests.values()))
    assert params.prompt is not None
    cpu = f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()} kernels"
    versions = [f"{name} {version(name)}" for name in ("flowroll", "torch", "diffusers", "transformers")]
    return {
        "model": f"{plan.model.resolve().name} ({record.family}, variant {plan.variant})",
        "prompt": params.prompt,
        "seeds": ", ".join(map(str, request.seeds)),
        "size": f"{geometry.width} x {geometry.height} pixels, {geometry.num_tokens} image tokens{_references(geometry)}",
        "steps": str(request.schedule.num_steps),
        "noise level": f"{params.noise_level:g}",
        "guidance": _guidance_words(request.guidance),
        "dtype": plan.dtype,
        "device": plan.device if plan.device == "cpu" else _gpus(),
        "CPU threads per rank": str(plan.num_threads),
        "machine": f"{platform.system()} {platform.machine()}, {cpu}",
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
    }


def _gpus() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    nccl: Any = torch.cuda.nccl
    return f"{found}; CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, nccl.version()))}"
