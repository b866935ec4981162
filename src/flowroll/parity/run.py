"""Runs a plan: one rank first, then every layout, each in a process of its own, one after the other."""

from __future__ import annotations

import contextlib
import datetime
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from flowroll.errors import EngineError, FlowrollError
from flowroll.parity.compare import compare_rollouts
from flowroll.parity.exchange import ChildSpec, Facts, encode_spec, read_facts, rollout_file
from flowroll.parity.plan import ParityPlan
from flowroll.parity.results import LayoutParity, ModeParity, ParityReport
from flowroll.types import Layout, Rollout
from flowroll.wire.files import load_rollout

# What the process of a layout is started as; it reads its specification from the first line of its standard input.
CHILD_COMMAND: tuple[str, ...] = (sys.executable, "-m", "flowroll.parity.child")
_LOG = "log.txt"
# The folders of an absolute path, which are no reader's business.
_FOLDERS = re.compile(r"(?<![\w./-])/(?:[^\s/'\"]+/)+")

Listener = Callable[[LayoutParity], None]


def run_parity(
    plan: ParityPlan, folder: Path, *, on_layout: Listener | None = None, command: Sequence[str] | None = None
) -> ParityReport:
    """Runs one rank and every layout, and compares.

    Args:
        plan: From `plan_parity`.
        folder: Where rollouts may lie for the while; it exists.
        on_layout: Called with the result of each layout.
        command: What to start for a layout.

    Raises:
        EngineError: One rank failed: there is nothing to compare with.
    """
    command = command or CHILD_COMMAND
    with tempfile.TemporaryDirectory(dir=folder, prefix=".rollouts-") as scratch:
        reference = Path(scratch) / "one-rank"
        facts = _run_child(plan, Layout(), reference, command)
        if facts.error is not None:
            raise EngineError(f"one rank must run before layouts are compared with it, got: {facts.error}")
        results = []
        for number, layout in enumerate(plan.layouts):
            result = _run_layout(plan, layout, reference, Path(scratch) / f"layout-{number}", command)
            results.append(result)
            if on_layout is not None:
                on_layout(result)
    return ParityReport(
        model=plan.model.resolve().name,
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        command=_command(plan),
        configuration=_configuration(plan, facts),
        versions=facts.versions,
        machine=facts.machine,
        transformer_bytes=facts.transformer_bytes,
        layouts=tuple(results),
    )


def _run_layout(plan: ParityPlan, layout: Layout, reference: Path, folder: Path, command: Sequence[str]) -> LayoutParity:
    """One layout against the rollouts in `reference`; its own are deleted."""
    facts = _run_child(plan, layout, folder, command)
    modes, error = [], facts.error
    try:
        for mode, seeds in facts.seeds.items():
            tensors = compare_rollouts(_load(reference, mode, plan.request.seeds), _load(folder, mode, seeds))
            steps = plan.request.schedule.num_steps * len(seeds)
            received = {axis: count / steps for axis, count in facts.received_bytes.get(mode, {}).items()}
            modes.append(ModeParity(mode=mode, tensors=tensors, received_bytes_per_step=received))
    except FlowrollError as failure:
        error = error or _without_folders(failure.message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return LayoutParity(
        layout=layout.name,
        num_ranks=layout.num_ranks,
        transformer_bytes=facts.transformer_bytes,
        modes=tuple(modes),
        error=error,
        idle_axes=_idle_axes(layout, modes),
    )


def _load(folder: Path, mode: str, seeds: Sequence[int]) -> list[Rollout]:
    return [load_rollout(rollout_file(folder, mode, seed)) for seed in seeds]


def _idle_axes(layout: Layout, modes: Sequence[ModeParity]) -> tuple[str, ...]:
    """The axes of the layout on which nothing was received in any mode."""
    axes = [axis for axis, degree in (("sp", layout.sp), ("cfg", layout.cfg), ("tp", layout.tp)) if degree > 1]
    return tuple(axis for axis in axes if modes and not any(mode.received_bytes_per_step.get(axis) for mode in modes))


def _run_child(plan: ParityPlan, layout: Layout, folder: Path, command: Sequence[str]) -> Facts:
    """Runs one layout to its end; whatever became of it is in the facts."""
    folder.mkdir()
    spec = ChildSpec(
        folder=str(folder),
        model=str(plan.model),
        variant=plan.variant,
        dtype=plan.dtype,
        device=plan.device,
        layout=layout,
        rank_timeout_s=plan.rank_timeout_s,
        num_threads=plan.num_threads,
        requests={mode: request for mode, request in plan.requests.items()},
    )
    with (folder / _LOG).open("wb") as log:
        # A session of its own: a Ctrl-C at the terminal reaches the harness alone, which then ends it.
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, text=True, start_new_session=True
        )
        assert process.stdin is not None
        try:
            # A child that ended at once has said why in its log.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(encode_spec(spec) + "\n")
                process.stdin.flush()
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    facts = read_facts(folder)
    error = facts.error or _why_ended(status, folder / _LOG, plan.requests.keys() - facts.seeds.keys())
    return facts if error is None else replace(facts, error=_without_folders(error))


def _why_ended(status: int, log: Path, undone: Set[str]) -> str | None:
    if status == 0 and not undone:
        return None
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f"; its last words: {lines[-1].strip()[:300]}" if lines else ""
    return f"the layout's process must end with every mode done, got its end {how}{last}"


def _without_folders(text: str) -> str:
    """The text with file names in place of absolute paths."""
    return _FOLDERS.sub("", text)


def _command(plan: ParityPlan) -> str:
    """The command line that repeats a run, with every default filled in, on several lines."""
    params = next(iter(plan.requests.values()))
    request, geometry = plan.request, plan.request.geometry
    lines = [
        ("flowroll", "parity", plan.model.resolve().name),
        ("--layouts", ",".join(layout.name for layout in plan.layouts), "--modes", ",".join(plan.requests)),
        ("--prompt", params.prompt, "--seed", str(params.seed), "--num-outputs", str(len(request.seeds))),
        ("--size", f"{geometry.width}x{geometry.height}", "--steps", str(request.schedule.num_steps)),
        ("--noise-level", f"{params.noise_level:g}", "--guidance-scale", f"{request.guidance.scale:g}"),
        ("--variant", plan.variant, "--dtype", plan.dtype, "--device", plan.device, "--threads", str(plan.num_threads)),
    ]
    return " \\\n    ".join(map(shlex.join, lines))


def _configuration(plan: ParityPlan, facts: Facts) -> Mapping[str, str]:
    request, geometry, record = plan.request, plan.request.geometry, plan.request.record
    params = next(iter(plan.requests.values()))
    guidance = f"{record.guidance_rule}, scale {record.guidance_scale:g}" if request.guidance.is_active else "none"
    return {
        "model": f"{plan.model.resolve().name} ({record.family}, variant {plan.variant}), {facts.parameters:,} parameters",
        "prompt": params.prompt,
        "seeds": ", ".join(map(str, request.seeds)),
        "size": f"{geometry.width} x {geometry.height} pixels, {geometry.num_tokens} image tokens",
        "steps": str(request.schedule.num_steps),
        "modes": ", ".join(plan.requests),
        "noise level": f"{params.noise_level:g} (of the stochastic modes)",
        "guidance": guidance,
        "dtype": plan.dtype,
        "device": plan.device,
        "CPU threads per rank": str(plan.num_threads),
    }
