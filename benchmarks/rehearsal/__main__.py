"""Rehearses every case on the fake device, records the figures, and writes the tables of the documentation.

python -m benchmarks.rehearsal
python -m benchmarks.rehearsal --only Z-Image --out found.json
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

from benchmarks.rehearsal.figures import LAYOUTS, RECORDED, Case, Figures, measure, read_recorded, write_recorded
from benchmarks.rehearsal.models import MODELS, SD35_LARGE
from benchmarks.rehearsal.tables import write_pages

GROUP = 16
# What `make test` rehearses: two blocks, a group on one rank in two sizes, and the first rank of every layout.
QUICK_LAYERS = 2
SIZES = (512, 1024)
QUICK = [
    Case(model=model.name, layers=QUICK_LAYERS, size=size, batch=GROUP if layout == "1" else 1, layout=layout)
    for layout, size, model in itertools.product(LAYOUTS, SIZES, [model for model in MODELS if model is not SD35_LARGE])
    if layout == "1" or size == SIZES[-1]
]
FULL = [
    Case(model=model.name, layers=None, size=size, batch=GROUP, layout="1") for model, size in itertools.product(MODELS, SIZES)
]


def main() -> None:
    """Rehearses the cases, and writes what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="one model, or `quick`: what `make test` holds to")
    parser.add_argument("--out", type=Path, default=RECORDED, help="where to record; pages are made of the default file alone")
    options = parser.parse_args()
    cases = QUICK if options.only == "quick" else [case for case in [*QUICK, *FULL] if options.only in (None, case.model)]
    found: dict[Case, Figures] = read_recorded() if options.out == RECORDED and RECORDED.exists() else {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found[case] = measure(case, Path(folder) / "checkpoint")
        print(case, found[case], flush=True)
        write_recorded(found, options.out)
    if options.out == RECORDED and set(found) >= {*QUICK, *FULL}:
        write_recorded({case: found[case] for case in [*QUICK, *FULL]}, RECORDED)
        write_pages(found)


if __name__ == "__main__":
    main()
