"""What sharing steps brings to an engine under load: encode, every step and decode included.

`python -m benchmarks.load`: 16 requests at once against the same 16 one at a time; requests of mixed lengths all at once
against the best static batches of them; and one request through the scheduler against its steps called in a plain loop. Each
row is measured in a process of its own: what an earlier one left in the heaps is part of no figure.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.batching import Cell, inexact, make_inputs
from benchmarks.measure import Ratio, clock_of, hardware, paired_times, ratio
from flowroll.engine import BatchLimits, Engine, RequestFuture
from flowroll.engine.outputs import Finished
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.model_runner import forward
from flowroll.engine.runner.sample import Sample
from flowroll.families import FAMILIES as REGISTERED
from flowroll.families import Guidance
from flowroll.families.base import NO_GUIDANCE
from flowroll.testing import make_checkpoint
from flowroll.types import Layout, SamplingParams

RESULTS = Path(__file__).parent / "results"
# Those that draw from text alone.
FAMILIES = tuple(name for name, family in REGISTERED.items() if not family.conditioning.in_place("image_kwargs"))
# As many steps as the families take by default.
SIZE, STEPS, TOKENS = 128, 50, 64
NUM_REQUESTS = 16
NUM_MIXED = 48
STATIC_SIZES = (4, 8, 16)

LOAD = f"""## Under load

Batched: wall time of {NUM_REQUESTS} requests of {STEPS} steps one at a time / all at once, aim >= 2 where the bound allows it.
Bound, step: the same ratio for one step of the transformer alone in the model's own inexact batch. Bound, request: what the
request as a whole gains from such steps if its encoding and decoding, one call a sample, gain nothing and nothing overlaps.
In a step: samples in the forwards of the run at once, mean. Mixed: wall time of {NUM_MIXED} requests of 4 to 28 steps in
their best static batches / all at once, aim >= 0.9; static batches are sorted by length, of
{", ".join(map(str, STATIC_SIZES))} requests (the best counts), and what ends early leaves them.

| family | dtype | batched | bound, step | bound, request | in a step | mixed (best static size) |
|---|---|---|---|---|---|---|"""

ALONE = """## One request

CPU time of one request through the scheduler / its stages called in a plain loop, aim <= 1.02: by the caller's thread, and by
the scheduler's own between two steps, which has the same heap. In a new process, and after load: ten times sixteen requests
at once.

| family | dtype | new, caller's loop | new, own loop | after load, caller's loop | after load, own loop |
|---|---|---|---|---|---|"""

RANKS = f"""## Under load, on two ranks

Wall time of {NUM_REQUESTS} requests of {STEPS} steps one at a time / all at once, one thread a rank; the same on one rank in
the same run; and the bound: the same ratio for a rank's part of one step in the model's own inexact batch, which knows neither
messages nor collectives (sp2: half of the image tokens; cfg2: one branch).

| family | dtype | layout | batched | batched on one rank | bound, step | in a step |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine's loop and of its stages")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--layout", nargs="*", choices=["sp2", "cfg2"], default=["sp2", "cfg2"], help="layouts of two ranks")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"load_cpu_{today:%Y%m}.md"
    head = (
        f"# An engine under load, {today:%Y-%m-%d}\n\n"
        f"Command: `python -m benchmarks.load {' '.join(sys.argv[1:])}`. {hardware()}; "
        f"threads: {options.threads}; load of the machine at the start: {os.getloadavg()[0]:.1f}. "
        f"Tiny models, {SIZE} x {SIZE} ({TOKENS} image tokens), guided, prompts of their own with equally many tokens. "
        "Medians of paired ratios with their 95 % intervals.\n\n"
        "Not claimed: absolute times (the machine is shared), any figure for a GPU."
    )
    load, alone, ranks = [LOAD], [ALONE], [RANKS]
    with tempfile.TemporaryDirectory() as folder:
        for family in options.family:
            checkpoint = make_checkpoint(family, Path(folder) / family, size="tiny")
            for dtype in options.dtype:
                cell = (checkpoint, dtype, options.threads, options.rounds)
                load.append(_apart(_load_row, *cell))
                alone.append(_apart(_alone_row, *cell))
                ranks += [_apart(_ranks_row, *cell, layout) for layout in options.layout]
                print(load[-1], alone[-1], *ranks[len(ranks) - len(options.layout) :], sep="\n", flush=True)
                # A long run that is cut off leaves what it has.
                out.write_text("\n\n".join([head, *map("\n".join, (load, alone, ranks))]) + "\n", encoding="utf-8")


def _apart(row: Callable[..., str], *arguments: object) -> str:
    """A row measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        return processes.submit(row, *arguments).result()


def _load_row(checkpoint: Path, dtype: str, threads: int, rounds: int) -> str:
    torch.set_num_threads(threads)
    with (
        _engine(checkpoint, dtype) as engine,
        Engine(
            checkpoint, dtype=dtype, device="cpu", batching=BatchLimits(max_batch_samples=1, max_running_samples=1)
        ) as single,
    ):
        requests = [_plan(engine, number, STEPS) for number in range(NUM_REQUESTS)]
        _run(engine, requests)
        before = Counter(engine.scheduler.load().batches)
        wall = paired_times(
            {"at once": lambda: _run(engine, requests), "in turn": lambda: [_run(single, [plan]) for plan in requests]},
            rounds=rounds,
            clock=time.perf_counter,
        )
        forwards = Counter(engine.scheduler.load().batches) - before
        assert NUM_REQUESTS in forwards, "the prompts must have equally many tokens, or the requests never share one forward"
        share = sum(size * number for size, number in forwards.items()) / forwards.total()
        step = _step_bound(engine, threads, rounds)
        lengths = random.Random(0).choices(range(4, 29), k=NUM_MIXED)
        mixed = [_plan(engine, number, steps) for number, steps in enumerate(lengths)]
        arms: dict[str, Callable[[], object]] = {
            str(size): lambda size=size: _run_static(engine, mixed, size)  # type: ignore[misc]
            for size in STATIC_SIZES
        }
        times = paired_times({"at once": lambda: _run(engine, mixed), **arms}, rounds=rounds, clock=time.perf_counter)
        best = min(map(str, STATIC_SIZES), key=lambda size: statistics.median(times[size]))
        whole = _request_bound(single, requests, step)
    return (
        f"| {engine.info.family} | {dtype} | {ratio(wall['in turn'], wall['at once'])} | {step} | {whole:.2f} | {share:.1f} | "
        f"{ratio(times[best], times['at once'])} ({best}) |"
    )


def _alone_row(checkpoint: Path, dtype: str, threads: int, rounds: int) -> str:
    torch.set_num_threads(threads)
    with _engine(checkpoint, dtype) as engine:
        requests = [_plan(engine, number, STEPS) for number in range(NUM_REQUESTS)]
        arms = {
            "scheduler": lambda: _run(engine, requests[:1]),
            "caller's": lambda: _run_plainly(engine, requests[0]),
            "own": lambda: engine.scheduler.between_steps(lambda: _run_plainly(engine, requests[0])).result(),
        }
        arms["scheduler"]()  # Its threads run from the first request on.
        found: list[Ratio] = []
        for is_new in (True, False):
            for _ in range(0 if is_new else 10):
                _run(engine, requests)
            times = paired_times(arms, rounds=5 * rounds, warmup=3)
            found += [ratio(times["scheduler"], times[loop]) for loop in ("caller's", "own")]
    return f"| {engine.info.family} | {dtype} | {' | '.join(map(str, found))} |"


def _ranks_row(checkpoint: Path, dtype: str, threads: int, rounds: int, layout: str) -> str:
    torch.set_num_threads(threads)
    with _engine(checkpoint, dtype) as one, _engine(checkpoint, dtype, Layout.parse(layout)) as two:
        arms: dict[str, Callable[[], object]] = {}
        for name, engine in (("one", one), ("two", two)):
            plans = [_plan(engine, number, STEPS) for number in range(NUM_REQUESTS)]
            arms[f"{name} at once"] = lambda engine=engine, plans=plans: _run(engine, plans)  # type: ignore[misc]
            arms[f"{name} in turn"] = lambda engine=engine, plans=plans: [_run(engine, [plan]) for plan in plans]  # type: ignore[misc]
        times = paired_times(arms, rounds=rounds, clock=time.perf_counter)
        sizes = two.scheduler.load().batches
        assert NUM_REQUESTS in sizes, "the requests must share a forward on the ranks"
        own = {"tokens": TOKENS // 2} if layout == "sp2" else {"guided": False}
        bound = _step_bound(one, threads, rounds, **own)  # type: ignore[arg-type]
        share = sum(size * number for size, number in sizes.items() if size > 1) / sum(
            number for size, number in sizes.items() if size > 1
        )
    on_two, on_one = (ratio(times[f"{name} in turn"], times[f"{name} at once"]) for name in ("two", "one"))
    return f"| {one.info.family} | {dtype} | {layout} | {on_two} | {on_one} | {bound} | {share:.1f} |"


def _engine(checkpoint: Path, dtype: str, layout: Layout | None = None) -> Engine:
    return Engine(checkpoint, dtype=dtype, device="cpu", layout=layout, batching=BatchLimits(max_running_samples=64))


def _plan(engine: Engine, number: int, steps: int) -> RequestPlan:
    # Of different text and, with two digits, of equally many tokens.
    prompt = f"a photo of {number:02d} glasses"
    params = SamplingParams(
        prompt=prompt, seed=number, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=4.0, debug_mode=False
    )
    return engine.plan(params)


def _run(engine: Engine, plans: Sequence[RequestPlan]) -> list[RequestFuture[object]]:
    requests = [engine.submit(plan, "rollout") for plan in plans]
    for accepted in requests:
        accepted.result()
    return requests


def _run_static(engine: Engine, plans: Sequence[RequestPlan], size: int) -> None:
    ordered = sorted(plans, key=lambda plan: plan.schedule.num_steps)
    for first in range(0, len(ordered), size):
        _run(engine, ordered[first : first + size])


@torch.no_grad()
def _run_plainly(engine: Engine, plan: RequestPlan) -> None:
    """Does what the scheduler does for a request, without it."""
    sample = Sample.start(engine._executor.encode(plan), plan.samples[0])
    while sample.num_steps_left:
        sample.take_step(forward([sample])[0])
    image = engine._executor.decode(sample)
    engine._as_rollout(plan, Finished(sample=sample, image=image, seconds=0.0, first_step=None, last_step=None))


@torch.no_grad()
def _step_bound(engine: Engine, threads: int, rounds: int, *, tokens: int = TOKENS, guided: bool = True) -> Ratio:
    model = engine._model
    cell = Cell(
        family=model.family,
        spec=model.spec,
        transformer=model.transformer,
        dtype=model.dtype,
        tokens=tokens,
        samples=NUM_REQUESTS,
        threads=threads,
    )
    inputs = make_inputs(cell, one_step=False)
    if not guided:
        inputs = [replace(one, guidance=Guidance(rule=NO_GUIDANCE, scale=0.0)) for one in inputs]

    def in_turn() -> None:
        for one in inputs:
            model.family.velocity(model.transformer, one, model.dtype)

    arms = {"in turn": in_turn, "batch": lambda: inexact(cell, inputs)}
    times = paired_times(arms, rounds=rounds, warmup=2, clock=clock_of(threads))
    return ratio(times["in turn"], times["batch"])


def _request_bound(single: Engine, requests: Sequence[RequestPlan], step: Ratio) -> float:
    timings = [accepted.timing for plan in requests for accepted in _run(single, [plan])]
    once = statistics.median(timing.encode + timing.decode for timing in timings)
    steps = statistics.median(timing.denoise for timing in timings)
    return (once + steps) / (once + steps / step.median)


if __name__ == "__main__":
    main()
