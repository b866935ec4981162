"""What batching gains: n samples in one exact forward, beside the samples in turn and the model's own, inexact batch.

`python -m benchmarks.batching`: guided samples at n different noise levels, or all at one (a group). The inexact batch merges
the same calls without any care for bits; it is the bound that the model and the machine set.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import clock_of, hardware, paired_times, ratio
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_transformer
from flowroll.engine.outline import outline_model
from flowroll.exact import Alone, Merged
from flowroll.families import FAMILIES as REGISTERED
from flowroll.families import Family, ForwardInput, ModelSpec, Output, StepInput
from flowroll.testing import make_checkpoint, random_input

RESULTS = Path(__file__).parent / "results"
FAMILIES = tuple(REGISTERED)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = {32: (8, 4), 64: (8, 8), 256: (16, 16), 1024: (32, 32)}
SAMPLES = (1, 2, 4, 8, 16)
# A prompt and a negative prompt.
TEXTS = (20, 7)
# Image tokens of all samples above which a cell of the mid-size models would take minutes.
MOST = {"tiny": 16 * 1024, "mid": 4 * 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured setting."""

    family: Family
    spec: ModelSpec
    transformer: Any
    dtype: torch.dtype
    tokens: int
    samples: int
    threads: int


def main() -> None:
    """Measures what the flags choose and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="at most; a slow cell gets 3")
    parser.add_argument("--size", nargs="+", choices=["tiny", "mid"], default=["tiny", "mid"])
    parser.add_argument("--tokens", nargs="+", type=int, choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"batching_cpu_{today:%Y%m}.md"
    sections = [
        f"# Several samples in one exact forward, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.batching {' '.join(sys.argv[1:])}`. {hardware()}; load of the machine at the start: "
        f"{os.getloadavg()[0]:.1f}. One step of n guided samples, {TEXTS[0]} and {TEXTS[1]} text tokens: in turn 2 n forwards "
        "where branches are separate, n forwards where they are a pair.",
        "Exact, group and inexact: how many times as fast as in turn; medians of paired ratios of time (CPU time with one "
        "thread, wall time with two) with their 95 % intervals. Group: exact, all samples at one noise level. Inexact: the "
        "model's own batch, the bound. Equal: samples whose velocity is that of the sample alone (`torch.equal`), exact and "
        "inexact. With n = 1 all but the last arm are the same code.",
        "Not claimed: absolute times (the machine is shared), any figure for a GPU.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            for family in FAMILIES:
                checkpoint = make_checkpoint(family, Path(folder) / f"{family}-{size}", size=size)
                rows = [row(cell, options.rounds) for cell in cells(checkpoint, MOST[size], options)]
                sections.append(table(f"{family}, {size}", rows))
                # A long run that is cut off leaves what it has.
                out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def cells(folder: Path, most: int, options: argparse.Namespace) -> Sequence[Cell]:
    """Everything to be measured of one checkpoint."""
    checkpoint = examine_checkpoint(folder, variant=None)
    loaded = {dtype: load_transformer(checkpoint, dtype, None) for dtype in DTYPES.values()}
    spec = outline_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32).spec
    return [
        Cell(
            family=checkpoint.family,
            spec=spec,
            transformer=loaded[dtype],
            dtype=dtype,
            tokens=tokens,
            samples=samples,
            threads=threads,
        )
        for threads in options.threads
        for dtype in DTYPES.values()
        for tokens in options.tokens
        for samples in options.samples
        if tokens * samples <= most
    ]


@torch.no_grad()
def row(cell: Cell, rounds: int) -> str:
    """One line of the table."""
    torch.set_num_threads(cell.threads)
    mixed, group = make_inputs(cell, one_step=False), make_inputs(cell, one_step=True)
    transformer = cell.transformer
    merged, alone = Merged(cell.family, cell.dtype), Alone(cell.family, cell.dtype)

    arms: dict[str, Callable[[], list[Tensor]]] = {
        "in turn": lambda: alone.velocities(transformer, mixed),
        "exact": lambda: merged.velocities(transformer, mixed),
        "group": lambda: merged.velocities(transformer, group),
        "inexact": lambda: inexact(cell, mixed),
    }
    started = time.perf_counter()
    expected, exact, loose = arms["in turn"](), arms["exact"](), arms["inexact"]()
    slow = time.perf_counter() - started > 6
    gc.collect()
    times = paired_times(arms, rounds=min(rounds, 3) if slow else rounds, clock=clock_of(cell.threads))
    gains = [str(ratio(times["in turn"], times[name])) for name in ("exact", "group", "inexact")]
    equal = [f"{sum(map(torch.equal, velocities, expected))}/{cell.samples}" for velocities in (exact, loose)]
    each = 1000 * statistics.median(times["in turn"]) / cell.samples
    setting = f"{cell.threads} | {str(cell.dtype)[6:]} | {cell.tokens} | {cell.samples}"
    line = f"| {setting} | {each:.1f} | {' | '.join((*gains, *equal))} |"
    print(line, flush=True)
    return line


def make_inputs(cell: Cell, *, one_step: bool) -> list[StepInput]:
    """Random samples with prompts of their own."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = TOKENS[cell.tokens]
    return [
        random_input(
            cell.family,
            cell.spec,
            height=rows * cell.spec.pixel_unit,
            width=columns * cell.spec.pixel_unit,
            texts=TEXTS,
            dtype=cell.dtype,
            generator=generator,
            timestep=0.7 if one_step else (index + 1) / 20,
        )
        for index in range(cell.samples)
    ]


def inexact(cell: Cell, inputs: Sequence[StepInput]) -> list[Tensor]:
    """The model's own batch of the same calls, branch by branch."""
    family = cell.family
    calls = [family.forward_inputs(one, cell.dtype) for one in inputs]
    columns = [outputs_of(cell, column) for column in zip(*calls, strict=True)]
    return [family.apply_guidance(outputs, one) for outputs, one in zip(zip(*columns, strict=True), inputs, strict=True)]


def outputs_of(cell: Cell, calls: Sequence[ForwardInput]) -> list[Output]:
    """One output per call, from one forward."""
    output = cell.transformer(**cell.family.collate(calls), return_dict=False)[0]
    return cell.family.uncollate(output, len(calls))


def table(title: str, rows: Sequence[str]) -> str:
    """The rows as Markdown."""
    head = "| threads | dtype | image tokens | n | in turn, ms a sample | exact | group | inexact | equal, exact | inexact |"
    return "\n".join([f"## {title}", "", head, "|" + "---|" * 10, *rows])


if __name__ == "__main__":
    main()
