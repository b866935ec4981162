"""The tables of docs/gpu.md and docs/howto/real-models.md, made of the recorded figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.rehearsal.figures import Case, Figures
from benchmarks.rehearsal.models import MODELS

_ROOT = Path(__file__).parents[2]
_BEGIN, _END = "<!-- computed: {} -->", "<!-- end -->"
GIB = 2**30
# Of a card's memory: what the driver, the context of CUDA, the kernels' workspaces and the allocator's gaps may take.
_SPARE_GIB = 2.0
# Name, and GiB that a program can have.
CARDS: Mapping[str, float] = {"24 GB": 23.6, "48 GB": 47.4, "80 GB": 79.2, "141 GB": 139.8}

Recorded = Mapping[Case, Figures]


def steps_table(recorded: Recorded) -> Iterator[str]:
    """Yields the lines of the table of steps."""
    columns = ("model", "blocks", "size", "group", "layout", "kernels", "plain", "views")
    columns += ("GB moved", "GB from ranks", "TFLOP", "MiB on the host", "peak GiB", "fits")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    order = [model.name for model in MODELS]
    for case, one in sorted(
        recorded.items(),
        key=lambda row: (row[0].layers is not None, order.index(row[0].model), row[0].layout != "1", row[0].size),
    ):
        peak, is_whole = rolling_out(one), case.layers is None
        values = (
            case.model,
            "all" if is_whole else case.layers,
            case.size,
            case.batch,
            case.layout,
            f"{one.kernels:,}",
            f"{one.plain_kernels:,}",
            f"{one.views:,}",
            f"{one.moved / 1e9:,.1f}",
            f"{one.gathered / 1e9:.2f}",
            f"{one.flops / 1e12:.1f}",
            f"{one.recorded / 2**20:.0f}",
            f"{peak / GIB:.1f}",
            _smallest(peak) if is_whole else "",
        )
        yield f"| {' | '.join(map(str, values))} |"


def rolling_out(one: Figures) -> int:
    """Returns the peak while steps are taken and a picture is decoded beside them."""
    return one.rolling + one.decode


def _smallest(num_bytes: int) -> str:
    return next((card for card, room in CARDS.items() if num_bytes <= _room(room)), "none")


def memory_tables(recorded: Recorded) -> Iterator[str]:
    """Yields the lines of the tables of what a model takes, and of which cards it fits."""
    found = {(case.model, case.size): one for case, one in recorded.items() if case.layers is None}
    columns = ("transformer", "text encoders, VAE, tables", "a step", "a decoding", "rolling out", "with new weights")
    yield f"| 16 samples, bfloat16 | size | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 2) + "|"
    for (name, size), one in found.items():
        step = one.rolling - one.transformer - one.others
        values = (one.transformer, one.others, step, one.decode, rolling_out(one), _updating(one))
        shown = " | ".join(f"{value / GIB:.1f}" for value in values)
        yield f"| {name}, {one.parameters / 1e9:.1f} B | {size} | {shown} |"
    yield ""
    yield f"| card | {' | '.join(f'{name}, {size}' for name, size in found)} |"
    yield "|---" * (len(found) + 1) + "|"
    for card, room in CARDS.items():
        yield f"| {card} | {' | '.join(_fits(one, _room(room)) for one in found.values())} |"


def _updating(one: Figures) -> int:
    """Returns the peak while new weights arrive beside requests that run."""
    return max(one.updating, rolling_out(one) + one.updating - one.transformer - one.others)


def _room(card_gib: float) -> float:
    return (card_gib - _SPARE_GIB) * GIB


def _fits(one: Figures, room: float) -> str:
    if _updating(one) <= room:
        return "yes"
    # Each rank of tp has its share of the transformer; rank 0 has the rest.
    ranks = next((n for n in (2, 4, 8) if _updating(one) - one.transformer * (1 - 1 / n) <= room), None)
    return "no" if ranks is None else f"`--tp {ranks}`"


PAGES = {"docs/gpu.md": ("steps", steps_table), "docs/howto/real-models.md": ("memory", memory_tables)}


def page_with(text: str, name: str, lines: list[str]) -> str:
    """Returns a page with these lines in the place of the table of this name."""
    head, begin, rest = text.partition(_BEGIN.format(name))
    _, end, tail = rest.partition(_END)
    assert begin and end, f"no place for {name}"
    return "\n".join([head + begin, *lines, end + tail])


def write_pages(recorded: Recorded) -> None:
    """Puts the tables into their pages."""
    for page, (name, lines) in PAGES.items():
        path = _ROOT / page
        path.write_text(page_with(path.read_text(encoding="utf-8"), name, list(lines(recorded))), encoding="utf-8")
