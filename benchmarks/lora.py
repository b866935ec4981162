"""What a LoRA adapter costs on a mid-size model: its load and its swap, and a rollout beside the model without one.

    python -m benchmarks.lora

A mid-size Z-Image transformer with random weights. The adapter (rank 16 on attention and feed-forward) is on disk, as a trainer
leaves it; a swap is `load_lora_adapter` under the same name, from the call to the answer, while the engine is idle. Beside it,
in the same run: `peft`'s own `load_adapter` of the same folder into a peft model of the same weights, and reading the folder's
file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from flowroll.engine import Engine
from flowroll.testing import make_checkpoint

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
_REQUEST: dict[str, Any] = {"prompt": "a cat", "height": 128, "width": 128, "num_inference_steps": 4, "debug_mode": False}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), given.repeats)


def _run(folder: Path, repeats: int) -> None:
    checkpoint = make_checkpoint("z_image", folder / "model", size="mid")
    with Engine(checkpoint, device="cpu") as engine:
        model = peft.get_peft_model(engine._model.transformer, peft.LoraConfig(r=16, target_modules=_TARGETS))
    for name in ("first", "second"):
        model.save_pretrained(str(folder / name))
    file = folder / "first" / "adapter_model.safetensors"
    with Engine(checkpoint, device="cpu") as engine:
        print(f"Z-Image mid-size: {engine.info.transformer_bytes / 2**20:.0f} MiB of weights in {engine.info.dtype};")
        print(f"adapter {file.stat().st_size / 2**20:.1f} MiB; {torch.get_num_threads()} threads; torch {torch.__version__}")
        _rows(engine, model, folder, repeats)
        _rollouts(engine)


def _rows(engine: Engine, model: Any, folder: Path, repeats: int) -> None:
    changes: dict[bool, list[Any]] = {False: [], True: []}
    rows: dict[str, Callable[[int], object]] = {
        "read the file": lambda _: (folder / "first/adapter_model.safetensors").read_bytes()
    }
    for merged, kind in ((False, "beside"), (True, "merged")):
        rows[f"swap, {kind}"] = lambda turn, merged=merged: changes[merged].append(
            engine.load_lora_adapter(folder / ("first", "second")[turn % 2], name=f"p{merged}", merged=merged)
        )
    rows["peft load_adapter"] = lambda turn: model.load_adapter(str(folder / "first"), f"turn{turn}")
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    cpu: dict[str, list[float]] = {name: [] for name in rows}
    # Turn 0 is the first load, in which peft finds the layers; the rows take turns.
    for turn in range(repeats + 1):
        for name, action in rows.items():
            started_s, own_s = time.perf_counter(), time.thread_time()
            action(turn)
            cpu[name].append(time.thread_time() - own_s)
            seconds[name].append(time.perf_counter() - started_s)
    print("\n| what | first | median | CPU time of the caller | of it paused |\n|---|---|---|---|---|")
    for name, found in seconds.items():
        own = changes[False] if name == "swap, beside" else changes[True] if name == "swap, merged" else []
        paused = f"{statistics.median(change.paused_s for change in own[1:]) * 1000:.2f} ms" if own else ""
        print(
            f"| {name} | {found[0] * 1000:.1f} ms | {statistics.median(found[1:]) * 1000:.1f} ms | "
            f"{statistics.median(cpu[name][1:]) * 1000:.1f} ms | {paused} |"
        )


def _rollouts(engine: Engine) -> None:
    times: dict[str | None, list[float]] = {None: [], "pFalse": [], "pTrue": []}
    for turn in range(4):
        for adapter in times:
            started_s = time.perf_counter()
            engine.rollout(**_REQUEST, lora_name=adapter, seed=turn)
            times[adapter].append(time.perf_counter() - started_s)
    base = statistics.median(times[None][1:])
    print("\n| rollout | median | over none |\n|---|---|---|")
    for adapter, name in ((None, "no adapter"), ("pFalse", "beside"), ("pTrue", "merged")):
        median = statistics.median(times[adapter][1:])
        print(f"| {name} | {median:.2f} s | {median / base:.2f} |")


if __name__ == "__main__":
    main()
