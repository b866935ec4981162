"""What sharing steps brings to an engine under load: encode, every step and decode included.

`python -m benchmarks.load`: 16 requests at once against the same 16 one at a time; requests of mixed lengths all at once
against the best static batches of them; and one request through the batcher against its steps called in a plain loop. The
bound of the first is what the model itself gains in an inexact batch, measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.batching import Cell, inexact, make_inputs
from benchmarks.measure import hardware, paired_times, ratio
from flowroll.engine import BatchLimits, Engine, denoising
from flowroll.engine.batching.limits import ONE_BY_ONE
from flowroll.engine.finishing import Finished
from flowroll.engine.plan import RequestPlan
from flowroll.testing import make_checkpoint
from flowroll.types import SamplingParams

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("qwen_image", "z_image")
# As many steps as the families take by default.
SIZE, STEPS, TOKENS = 128, 50, 64
NUM_REQUESTS = 16
NUM_MIXED = 48
STATIC_SIZES = (4, 8, 16)


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"load_cpu_{today:%Y%m}.md"
    head = [
        f"# An engine under load, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.load {' '.join(sys.argv[1:])}`. {hardware()}; one thread a line of work; load of the "
        f"machine at the start: {os.getloadavg()[0]:.1f}. Tiny models, {SIZE} x {SIZE} ({TOKENS} image tokens), guided, "
        "prompts of their own.",
        "Medians of paired ratios with their 95 % intervals. "
        f"Batched: wall time of {NUM_REQUESTS} requests of {STEPS} steps one at a time / all at once, aim >= 2 where the bound "
        "allows it. Bound: the same ratio for one step of the transformer alone in the model's own inexact batch. Mixed: wall "
        f"time of {NUM_MIXED} requests of 4 to 28 steps in their best static batches / all at once, aim >= 0.9; static batches "
        f"are sorted by length, of {', '.join(map(str, STATIC_SIZES))} requests (the best counts), and what ends early leaves "
        "them. Alone: CPU time of one request through the batcher / its stages called in a plain "
        "loop, aim <= 1.02; before the load, and after it, when the loop's thread has the heap that large batches left.",
        "Not claimed: absolute times (the machine is shared), any figure for a GPU.",
    ]
    table = [
        "| family | dtype | batched | bound | mixed (best static size) | alone, before | alone, after |\n"
        "|---|---|---|---|---|---|---|"
    ]
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            checkpoint = make_checkpoint(family, Path(folder) / family, size="tiny")
            for dtype in options.dtype:
                table.append(_row(checkpoint, dtype, options.rounds))
                print(table[-1], flush=True)
                # A long run that is cut off leaves what it has.
                out.write_text("\n\n".join([*head, "\n".join(table)]) + "\n", encoding="utf-8")


def _row(checkpoint: Path, dtype: str, rounds: int) -> str:
    with (
        Engine(checkpoint, dtype=dtype, device="cpu", batching=BatchLimits(max_running_samples=64)) as engine,
        Engine(checkpoint, dtype=dtype, device="cpu", batching=ONE_BY_ONE) as one_by_one,
    ):
        family = engine.info.family
        requests = [_plan(engine, number, STEPS) for number in range(NUM_REQUESTS)]
        alone_before = _alone(engine, requests[0], rounds)
        wall = paired_times(
            {"at once": lambda: _run(engine, requests), "in turn": lambda: [_run(one_by_one, [plan]) for plan in requests]},
            rounds=rounds,
            clock=time.perf_counter,
        )
        lengths = random.Random(0).choices(range(4, 29), k=NUM_MIXED)
        mixed = [_plan(engine, number, steps) for number, steps in enumerate(lengths)]
        arms: dict[str, Callable[[], object]] = {
            str(size): lambda size=size: _run_static(engine, mixed, size)  # type: ignore[misc]
            for size in STATIC_SIZES
        }
        times = paired_times({"at once": lambda: _run(engine, mixed), **arms}, rounds=rounds, clock=time.perf_counter)
        best = min(map(str, STATIC_SIZES), key=lambda size: statistics.median(times[size]))
        alone_after = _alone(engine, requests[0], rounds)
        bound = _bound(engine, rounds)
    return (
        f"| {family} | {dtype} | {ratio(wall['in turn'], wall['at once'])} | {bound} | "
        f"{ratio(times[best], times['at once'])} ({best}) | {alone_before} | {alone_after} |"
    )


def _alone(engine: Engine, plan: RequestPlan, rounds: int) -> str:
    arms = {"batcher": lambda: _run(engine, [plan]), "loop": lambda: _run_plainly(engine, plan)}
    times = paired_times(arms, rounds=4 * rounds, warmup=3)
    return str(ratio(times["batcher"], times["loop"]))


def _plan(engine: Engine, number: int, steps: int) -> RequestPlan:
    # Of equal length in tokens, so that all may share forwards, and of different text.
    prompt = f"a photo of {'abcdefghijklmnop'[number % 16]} {'qrstuvwxyz'[number // 16]} glasses"
    params = SamplingParams(
        prompt=prompt, seed=number, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=4.0, debug_mode=False
    )
    return engine.plan(params)


def _run(engine: Engine, plans: Sequence[RequestPlan]) -> None:
    for accepted in [engine.submit(plan, "rollout") for plan in plans]:
        accepted.result()


def _run_static(engine: Engine, plans: Sequence[RequestPlan], size: int) -> None:
    ordered = sorted(plans, key=lambda plan: plan.schedule.num_steps)
    for first in range(0, len(ordered), size):
        _run(engine, ordered[first : first + size])


@torch.no_grad()
def _run_plainly(engine: Engine, plan: RequestPlan) -> None:
    """What the lines of work do for a request, without them."""
    task = engine._work.encode(plan)
    sample = denoising.start(task, plan.seeds[0])
    denoising.denoise(task, sample, lambda: None)
    image = engine._work.decode(task, sample)
    engine._as_rollout(plan, Finished(sample=sample, env=task.env, record=task.record, image=image, seconds=0.0))


@torch.no_grad()
def _bound(engine: Engine, rounds: int) -> str:
    model = engine._model
    cell = Cell(
        family=model.family, transformer=model.transformer, dtype=model.dtype, tokens=TOKENS, samples=NUM_REQUESTS, threads=1
    )
    inputs = make_inputs(cell, one_step=False)

    def in_turn() -> None:
        for one in inputs:
            model.family.velocity(model.transformer, one.latents, one.timestep, one.env, one.guidance, model.dtype)

    times = paired_times({"in turn": in_turn, "batch": lambda: inexact(cell, inputs)}, rounds=rounds, warmup=2)
    return str(ratio(times["in turn"], times["batch"]))


if __name__ == "__main__":
    main()
