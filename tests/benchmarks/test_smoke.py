"""Every benchmark imports and runs in its smallest form, so that none breaks unseen when code moves.

Tiny checkpoints, one round, and this process in place of others. The figures mean nothing here.
"""

import contextlib
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.serving.servers import serving

import benchmarks
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.testing import make_checkpoint

NAMES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]
# The constants of each benchmark in its smallest form, and the flags of its command line.
SMALL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "batching": (
        {"FAMILIES": ("qwen_image",)},
        ["--rounds", "1", "--size", "tiny", "--tokens", "64", "--samples", "2", "--threads", "1"],
    ),
    "load": (
        {"FAMILIES": ("z_image",), "NUM_REQUESTS": 1, "NUM_MIXED": 1, "STATIC_SIZES": (1,), "STEPS": 1, "SIZE": 64},
        ["--rounds", "1", "--dtype", "float32", "--layout"],
    ),
    "lora": ({"_REQUEST": {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 1}}, ["--repeats", "1"]),
    "replay": ({"SIZE": 64, "SIDES": (64,), "PAIRS": 2}, ["--rounds", "1"]),
    "responsive": ({"CLIENTS": ("application/json",)}, ["--rounds", "1"]),
    "run": ({}, ["--rounds", "1"]),
    "weights": ({}, ["--rounds", "1", "--layers", "1"]),
    "wire": ({"STEPS": 2, "SIZE": 64, "TEXT_TOKENS": 4}, ["--rounds", "1", "--fresh", "1"]),
}
# They start servers, ranks or commands as processes; soak and overload have proofs of their own in tests/serving, and the
# stages for a GPU in test_gpu. The store
# has an index of samples that are not there, which the checker of annotations would read.
TAKE_LONGER = {
    "beside",
    "cluster",
    "cluster_model",
    "gpu.run",
    "group",
    "overload",
    "parallel",
    "ray_serve",
    "rehearsal.__main__",
    "soak",
    "startup",
    "store",
}
PRINT_ONLY = {"lora", "replay"}


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_every_command_is_run_here_or_named_as_one_that_takes_longer() -> None:
    commands = {name.partition(".")[2] for name in NAMES if hasattr(importlib.import_module(name), "main")}
    assert commands == SMALL.keys() | TAKE_LONGER


# The others are in `make proofs`.
FIRST = ("engine", "run", "transition")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in SMALL])
def test_every_benchmark_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    constants, flags = SMALL[name]
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    in_this_process(name, module, tmp_path, monkeypatch)
    out = tmp_path / "out.md"
    monkeypatch.setattr(sys, "argv", [name, *flags, *([] if name in PRINT_ONLY else ["--out", str(out)])])
    module.main()
    text = capsys.readouterr().out if name in PRINT_ONLY else out.read_text()
    assert "|---|" in text


def in_this_process(name: str, module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a benchmark use tiny checkpoints, and this process for what it does in others."""

    def tiny(family: str, directory: Path, **options: Any) -> Path:
        return make_checkpoint(family, directory, **{**options, "size": "tiny"})  # type: ignore[arg-type]

    if hasattr(module, "make_checkpoint"):
        monkeypatch.setattr(module, "make_checkpoint", tiny)
    match name:
        case "run":
            for section, constants in ((module.engine, {"SIZE": 64, "make_checkpoint": tiny}), (module.transition, TRANSITION)):
                for constant, value in constants.items():
                    monkeypatch.setattr(section, constant, value)
        case "load":
            monkeypatch.setattr(module, "_apart", lambda row, *arguments: row(*arguments))
        case "wire":
            monkeypatch.setattr(module, "_in_a_process", module._fresh)
        case "responsive":
            monkeypatch.setattr(module, "REQUEST", {**module.REQUEST, "width": 64, "height": 64, "num_inference_steps": 2})

            def drive(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
                measured = module._drive(command[command.index("--drive") + 1], 1)
                return subprocess.CompletedProcess(command, 0, stdout=json.dumps(measured))

            monkeypatch.setattr(module.subprocess, "run", drive)
        case "weights":

            @contextlib.contextmanager
            def server(checkpoint: Path) -> Iterator[str]:
                with (
                    Engine(checkpoint, dtype="float32", device="cpu") as engine,
                    EngineService(engine, max_queue=4) as worker,
                    serving(worker, weights_roots=(str(checkpoint),), allow_pickle_weights=True) as http,
                ):
                    yield str(http.base_url)

            monkeypatch.setattr(module, "_server", server)


TRANSITION = {"SHAPE": (16, 8), "REPEATS": 1}
