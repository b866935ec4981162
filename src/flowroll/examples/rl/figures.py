"""Runs every training example with three seeds and with every mistake, and draws the curves of docs/training.md.

    python -m flowroll.examples.rl.figures --runs runs --out docs/training

A run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flowroll.examples.rl.journal import Row, plot, read_rows
from flowroll.examples.rl.spoiling import MISTAKES, SPOIL_REWARDS

_SEEDS = (0, 1, 2)


# Where chance alone moves a run by as much as 0.05, one control says little.
_EVERY_SEED = tuple(f"{mistake}, seed {seed}" for mistake in SPOIL_REWARDS for seed in _SEEDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training example.

    Attributes:
        name: Of its files.
        title: Above its curves.
        command: Module and flags.
        mistakes: With which it is run as well, each with the first seed unless it says ", seed N".
    """

    name: str
    title: str
    command: tuple[str, ...]
    mistakes: tuple[str, ...] = tuple(SPOIL_REWARDS)


EXAMPLES = (
    Example(name="sde", title="Flow-GRPO, every step stochastic", command=("flowroll.examples.flow_grpo",), mistakes=MISTAKES),
    Example(
        name="window",
        title="Flow-GRPO, two stochastic steps",
        command=("flowroll.examples.flow_grpo", "--window", "2", "--learning-rate", "5e-4"),
    ),
    Example(name="cps", title="Flow-GRPO with CPS", command=("flowroll.examples.flow_grpo", "--dynamics", "cps")),
    Example(
        name="mix",
        title="MixGRPO, a window of two steps that moves",
        command=("flowroll.examples.flow_grpo", "--window", "2", "--move-every", "4", "--learning-rate", "5e-4"),
    ),
    Example(
        name="dance",
        title="DanceGRPO: Dance-SDE, one initial noise for a group, three stochastic steps",
        command=(
            *("flowroll.examples.flow_grpo", "--dynamics", "dance", "--noise-level", "1", "--same-start"),
            *("--window", "3", "--learning-rate", "5e-4"),
        ),
    ),
    Example(name="branch", title="BranchGRPO, eight leaves", command=("flowroll.examples.branch_grpo",)),
    Example(name="nft", title="DiffusionNFT", command=("flowroll.examples.diffusion_nft",), mistakes=_EVERY_SEED),
    Example(
        name="nft-ema",
        title="DiffusionNFT, the old policy a moving average on the server",
        command=("flowroll.examples.diffusion_nft", "--decay", "0.5"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then the figures and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each is a server and a trainer, which take turns")
    parser.add_argument("--only", nargs="+", choices=[example.name for example in EXAMPLES], default=None)
    options = parser.parse_args(arguments)
    chosen = [example for example in EXAMPLES if options.only is None or example.name in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_run, example, label, options.runs) for example in chosen for label in _labels(example)]
        for job in jobs:
            job.result()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["| example | run | mean reward, start | end | rounds | minutes |", "|---|---|---|---|---|---|"]
    for example in chosen:
        runs = {label: read_rows(_folder(example, label, options.runs) / "rewards.csv") for label in _labels(example)}
        plot(runs, options.out / f"{example.name}.png", title=example.title)
        lines += [_line(example, label, rows) for label, rows in runs.items()]
    (options.out / "rewards.md").write_text("\n".join(lines) + "\n")


def _labels(example: Example) -> tuple[str, ...]:
    return (*(f"seed {seed}" for seed in _SEEDS), *example.mistakes)


def _folder(example: Example, label: str, runs: Path) -> Path:
    return runs / f"{example.name}-{label.replace(',', '').replace(' ', '-')}"


def _run(example: Example, label: str, runs: Path) -> None:
    folder = _folder(example, label, runs)
    if (folder / "rewards.png").is_file():
        return
    mistake, _, seed = label.rpartition("seed ") if "seed " in label else (label, "", "0")
    flags = ["--seed", seed]
    if mistake:
        flags += ["--mistake", mistake.removesuffix(", ")]
    subprocess.run([sys.executable, "-m", *example.command, "--out", str(folder), *flags], check=True)


def _line(example: Example, label: str, rows: Sequence[Row]) -> str:
    evaluations = [row.evaluation for row in rows if row.evaluation is not None]
    minutes = rows[-1].seconds / 60
    return f"| {example.name} | {label} | {evaluations[0]:.3f} | {evaluations[-1]:.3f} | {rows[-1].round} | {minutes:.1f} |"


if __name__ == "__main__":
    main()
