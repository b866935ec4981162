"""The report of a comparison: Markdown for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from flowroll.parity.compare import Measure
from flowroll.parity.run import LayoutParity, ParityReport
from flowroll.types import Number

_HOW_TO_READ = (
    "*Equal* is `torch.equal` to the run on one rank, with the same shape and dtype and no tolerance. The differences and the "
    "cosine are computed in float64 and are the worst over all samples. *Step 0* of latents and sigmas is what the first step "
    "starts from and what it makes. `sampling` is the record of how the sample was made: schedule, guidance, dtypes. Modes "
    "with the same figures share a row."
)
_FIGURES = (
    *("tensor", "mode", "step 0: equal", "max abs diff", "min cosine"),
    *("all steps: equal", "max abs diff", "mean abs diff", "min cosine", "first step that differs"),
)


def to_json(report: ParityReport) -> str:
    """Returns all figures. One that is not a number, or that there is none of, is null."""
    layouts = [{"is_exact": layout.is_exact, **msgspec.to_builtins(layout)} for layout in report.layouts]
    plain = {"is_exact": report.is_exact, **msgspec.to_builtins(report), "layouts": layouts}
    return msgspec.json.format(msgspec.json.encode(plain), indent=1).decode() + "\n"


def to_markdown(report: ParityReport) -> str:
    """Returns the whole report: the verdict first, every figure last."""
    word = "exact" if report.is_exact else "not exact"
    parts = [
        f"# Parity of {report.setting['model']}, {report.setting['dtype']}: {word}",
        summary(report),
        "## What was run",
        _table(
            ("setting", "value"), [(name, _line(value).replace("|", "\\|")) for name, value in report.setting.items()], left=2
        ),
        *(f"{what[0].upper()}{what[1:]}:\n\n```\n{command}\n```" for what, command in report.commands.items()),
        "## Every figure",
        _HOW_TO_READ,
        *_figures(report),
    ]
    return "\n\n".join(parts) + "\n"


def summary(report: ParityReport) -> str:
    """Returns what was exact and what was not, in a few sentences and a table of the layouts."""
    exact = [layout.layout for layout in report.layouts if layout.is_exact]
    lines = [f"**Exact: {len(exact)} of {len(report.layouts)} layouts**" + (f" ({', '.join(exact)})." if exact else ".")]
    for layout in report.layouts:
        if layout.differing:
            found = ", ".join(f"`{tensor.name}` ({tensor.mode})" for tensor in layout.differing)
            lines.append(f"**Not exact: {layout.layout}.** {len(layout.differing)} of {len(layout.tensors)} differ: {found}.")
        if layout.error is not None:
            lines.append(f"**Failed: {layout.layout}.** {_line(layout.error)}")
        if layout.idle_axes:
            lines.append(
                f"{layout.layout}: no byte moved on {' and '.join(layout.idle_axes)}, so nothing was shared out there "
                "(no guidance for cfg, or too few tokens for sp), and this run says nothing about it."
            )
    return "\n\n".join([*lines, _layouts_table(report)])


def _layouts_table(report: ParityReport) -> str:
    axes = [axis for axis in ("sp", "cfg", "tp") if any(layout.received_bytes.get(axis) for layout in report.layouts)]
    header = [
        "layout",
        "ranks",
        *report.modes,
        "transformer weights per rank",
        *(f"received per step, {axis}" for axis in axes),
    ]
    rows = []
    for layout in (report.one_rank, *report.layouts):
        is_reference = layout is report.one_rank
        cells = ["reference" if is_reference else _mode_cell(layout, mode) for mode in report.modes]
        received = [_bytes(layout.received_bytes.get(axis, 0)) for axis in axes]
        name = "one rank" if is_reference else layout.layout
        rows.append([name, str(layout.num_ranks), *cells, _bytes(layout.transformer_bytes), *received])
    return _table(header, rows, left=1)


def _mode_cell(layout: LayoutParity, mode: str) -> str:
    """Returns how many tensors of a mode are equal."""
    equal = [tensor.whole.equal for tensor in layout.tensors if tensor.mode == mode]
    if not equal:
        return "failed"
    return f"all {len(equal)} equal" if all(equal) else f"**{sum(equal)} of {len(equal)} equal**"


def _figures(report: ParityReport) -> Iterator[str]:
    """Makes one table for all layouts that have the same figures."""
    groups: dict[str, list[str]] = {}
    for layout in report.layouts:
        rows: dict[tuple[str, ...], list[str]] = {}
        for each in layout.tensors:
            rows.setdefault((f"`{each.name}`", *_figures_cells(each.first, each.whole)), []).append(each.mode)
        table = _table(_FIGURES, [(name, ", ".join(modes), *cells) for (name, *cells), modes in rows.items()], left=2)
        groups.setdefault(table if rows else "Nothing was compared.", []).append(layout.layout)
    for table, layouts in groups.items():
        yield f"### {', '.join(layouts)}"
        yield table


def _figures_cells(first: Measure | None, whole: Measure) -> list[str]:
    def cells(each: Measure) -> list[str]:
        return ["yes" if each.equal else "**no**", shown_difference(each.max_abs), shown_cosine(each.min_cosine)]

    equal, largest, cosine = cells(whole)
    step = "-" if whole.first_step is None else str(whole.first_step)
    note = f"{step}; {whole.note}" if whole.note else step
    return [*(["-"] * 3 if first is None else cells(first)), equal, largest, shown_difference(whole.mean_abs), cosine, note]


def shown_difference(value: Number | None) -> str:
    """Rounds to two digits; 0 only if it is 0."""
    if value is None:
        return "-"
    return f"{value:.1e}" if value else "0"


def shown_cosine(value: Number | None) -> str:
    """Shows how much a cosine lacks of 1 where it is near; 1 only if it is 1."""
    if value is None:
        return "-"
    return "1" if value == 1 else f"1 - {1 - value:.1e}" if 0.999 < value < 1 else f"{value:.4f}"


def _bytes(count: Number) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B" if count else "0"


def _line(text: str) -> str:
    """Returns the text on one line, so that it stays in its paragraph."""
    return " ".join(text.split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Returns a Markdown table, also readable as plain text; the first `left` columns are flushed left."""
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{'<' if column < left else '>'}{widths[column]}}" for column, cell in enumerate(cells))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
