"""Runs the stages one after the other, each in a process of its own with a limit of its own, all in under nine minutes.

    benchmarks/gpu/run.sh --out results                        # on a GPU
    benchmarks/gpu/run.sh --out dry --device cpu --tiny        # every stage with tiny sizes

A stage leaves <out>/<stage>.json, also when it is stopped. Started again with the same folder, stages that are done are left
alone; `--again` names one to repeat, `--only` the ones to run. One stage is run by its name alone: `--only fast`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.gpu.report import Report

# Given the report, the device and whether all is tiny.
Stage: TypeAlias = "Callable[[Report, Any, bool], None]"

# The seconds that each stage has, its imports included.
LIMITS = {
    "machine": 30,
    "certification": 60,
    "promises": 90,
    "qwen_image": 150,
    "z_image": 60,
    "sd3": 50,
    "decode": 40,
    "weights": 40,
}
# Stages that are run where `--only` names them, beside those nine minutes.
LATER = {"fast": 180}
ALL = {**LIMITS, **LATER}
# How much longer a stage has in a dry run, in which torch's own imports and traces take the most.
DRY = 6
# Between the end of a stage's own time and that of its process.
SPARE_S = 5


def stage_of(name: str) -> Stage:
    """The function of a stage; imported here, so that the process that starts the stages does not wait for torch."""
    from benchmarks.gpu import checks, fast, speed

    return {
        "machine": checks.machine,
        "certification": checks.certification,
        "promises": checks.promises,
        "decode": speed.decode,
        "weights": speed.weights,
        "fast": fast.fast,
    }.get(name) or partial(speed.steps, family=name)


def run_stage(name: str, out: Path, device: str, *, is_tiny: bool) -> Report:
    """Runs a stage in this process."""
    report = Report(out / f"{name}.json", name, ALL[name] * (DRY if is_tiny else 1) - SPARE_S)
    with report.trying(name):
        import torch

        place = torch.device(device)
        stage_of(name)(report, torch.device("cuda", place.index or 0) if place.type == "cuda" else place, is_tiny)
    report.end()
    return report


def run_in_process(name: str, out: Path, options: argparse.Namespace) -> None:
    """Runs a stage in a process of its own, and ends it when its time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--stage", name, "--out", str(out), "--device", options.device]
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    started, limit_s = time.monotonic(), ALL[name] * (DRY if options.tiny else 1)
    try:
        ended = subprocess.run([*command, *(["--tiny"] if options.tiny else [])], timeout=limit_s).returncode
        state = None if ended == 0 else f"failed: the process ended with {ended}"
    except subprocess.TimeoutExpired:
        state = "out of time"
    if state is not None:
        left = json.loads(path.read_text()) if path.exists() else {"stage": name, "results": [], "skipped": [], "errors": []}
        path.write_text(json.dumps({**left, "state": state, "seconds": time.monotonic() - started}, indent=1))


def is_done(path: Path) -> bool:
    """Whether a stage has left a report that is complete."""
    return path.exists() and json.loads(path.read_text()).get("state") == "done"


def main() -> None:
    """Runs what is left to run, and prints where every stage stands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the reports")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the stages out")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(LIMITS), help="the stages to run")
    parser.add_argument("--again", nargs="+", choices=ALL, default=[], help="stages to run although they are done")
    parser.add_argument("--stage", choices=ALL, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # What is found here is no answer of an earlier run.
    os.environ["FLOWROLL_CACHE_DIR"] = str(options.out.resolve())
    if options.stage is not None:
        run_stage(options.stage, options.out, options.device, is_tiny=options.tiny)
        return
    for name in ALL:
        path = options.out / f"{name}.json"
        if name in options.only and (name in options.again or not is_done(path)):
            run_in_process(name, options.out, options)
        if path.exists():
            found = json.loads(path.read_text())
            counts = ", ".join(f"{len(found[kind])} {kind}" for kind in ("results", "skipped", "errors"))
            print(f"{name:14} {found['state']:12} {found.get('seconds', 0):6.1f} s  {counts}", flush=True)


if __name__ == "__main__":
    main()
