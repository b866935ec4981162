"""`make bench`: every CPU benchmark, side by side with its peer; writes benchmarks/results/<what>_<hardware>_<yyyymm>.md."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch

from benchmarks import engine, transition
from benchmarks.measure import hardware
from flowroll.families import FAMILIES

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the benchmarks and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="paired rounds of the engine benchmark")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="of the engine benchmark")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m benchmarks.run --families {' '.join(options.families)} --rounds {options.rounds}"
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"spine_cpu_{today:%Y%m}.md"
    sections = [
        f"# The cost of a rollout, {today:%Y-%m-%d}",
        f"Command: `{command}`. {hardware()}; one thread.",
        "Not claimed: absolute times (the machine is shared), any figure for a GPU, for real weights or for real sizes.",
        engine.run(options.rounds, options.families),
        transition.run(100),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
