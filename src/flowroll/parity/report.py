"""The report of a run, as Markdown for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from flowroll.parity.results import LayoutParity, Measure, ModeParity, ParityReport, TensorParity
from flowroll.types import Number

MARKDOWN_NAME, JSON_NAME = "parity.md", "parity.json"
_HOW_TO_READ = (
    "*Equal* is `torch.equal` to the run on one rank, with the same shape and dtype and no tolerance. The other figures are "
    "computed in float64 and are the worst over all samples (the mean absolute difference: their mean): *max abs* and "
    "*mean abs* of the difference, and the smallest cosine over the steps (for tensors with one number a step, over all "
    "steps together). The *first step* of `latents` and `sigmas` is what it starts from and what it makes. `record` is how "
    "the sample was made: seed, schedule, guidance, dtypes. Layouts with the same figures share a table, modes with the "
    "same figures a row."
)


def write_report(report: ParityReport, folder: Path) -> tuple[Path, Path]:
    """Writes both forms; returns the Markdown's path and the JSON's."""
    markdown, data = folder / MARKDOWN_NAME, folder / JSON_NAME
    markdown.write_text(to_markdown(report), encoding="utf-8")
    data.write_text(to_json(report), encoding="utf-8")
    return markdown, data


def to_json(report: ParityReport) -> str:
    """All figures. One that is not a number, or that there is none of, is null."""
    plain = {
        "is_exact": report.is_exact,
        **msgspec.to_builtins(report),
        "layouts": [{"is_exact": layout.is_exact, **msgspec.to_builtins(layout)} for layout in report.layouts],
    }
    return msgspec.json.format(msgspec.json.encode(plain), indent=1).decode() + "\n"


def to_markdown(report: ParityReport) -> str:
    """The whole report: the verdict first, every figure last."""
    parts = [
        f"# Parity of {report.model}, {report.configuration.get('dtype', '')}: {_word(report.is_exact)}",
        verdict(report),
        _layouts_table(report),
        *_problems(report),
        "## What was run",
        _facts_table(report),
        f"```\n{report.command}\n```",
        "## Every figure",
        _HOW_TO_READ,
        *_details(report),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(report: ParityReport) -> str:
    """What was exact and what was not, in a few sentences."""
    exact = [layout for layout in report.layouts if layout.is_exact]
    lines = [] if exact else [f"**Exact: none of {len(report.layouts)} layouts.**"]
    if exact:
        counts = sorted({layout.num_compared for layout in exact})
        names = ", ".join(layout.layout for layout in exact)
        lines.append(
            f"**Exact: {len(exact)} of {len(report.layouts)} layouts** ({names}). In each, all {' or '.join(map(str, counts))} "
            "tensors that were compared, over every step and sample, have the bits of one rank (`torch.equal`)."
        )
    for layout in report.layouts:
        if not layout.is_exact:
            lines.append(f"**Not exact: {layout.layout}.** {_why_not(layout)}")
        if layout.idle_axes:
            lines.append(
                f"{layout.layout}: no byte moved on {' and '.join(layout.idle_axes)}, so nothing was shared out there "
                "(no guidance for cfg, or too few tokens for sp), and this run says nothing about it."
            )
    return "\n\n".join(lines)


def _why_not(layout: LayoutParity) -> str:
    parts = []
    for mode in layout.modes:
        if mode.differing:
            names = ", ".join(f"`{tensor.name}`" for tensor in mode.differing)
            parts.append(f"{mode.mode}: {len(mode.differing)} of {len(mode.tensors)} tensors differ ({names}).")
    if layout.error is not None:
        parts.append(f"It failed: {_line(layout.error)}")
    return " ".join(parts)


def _layouts_table(report: ParityReport) -> str:
    axes = [axis for axis in ("sp", "cfg", "tp") if any(_received(layout, axis) for layout in report.layouts)]
    modes = list(dict.fromkeys(mode.mode for layout in report.layouts for mode in layout.modes))
    header = ["layout", "ranks", *modes, "transformer weights per rank", *(f"received per step, {axis}" for axis in axes)]
    rows = [["one rank", "1", *["reference"] * len(modes), _weights(report, report.transformer_bytes), *["-"] * len(axes)]]
    for layout in report.layouts:
        cells = [mode_cell(layout, mode) for mode in modes]
        received = [_bytes(_received(layout, axis)) for axis in axes]
        name = f"{layout.layout} (one rank again)" if layout.num_ranks == 1 else layout.layout
        rows.append([name, str(layout.num_ranks), *cells, _weights(report, layout.transformer_bytes), *received])
    note = (
        "Each cell counts the tensors of a mode that are equal to one rank's. Received: what rank 0 got from other ranks in "
        "the forwards of one step, by mesh axis, the mean over steps and modes."
    )
    return f"{_table(header, rows, left=1)}\n\n{note}"


def mode_cell(layout: LayoutParity, name: str) -> str:
    """How many tensors of a mode are equal."""
    mode = next((mode for mode in layout.modes if mode.mode == name), None)
    if mode is None:
        return "failed"
    equal, total = len(mode.tensors) - len(mode.differing), len(mode.tensors)
    return f"all {total} equal" if equal == total else f"**{equal} of {total} equal**"


def _problems(report: ParityReport) -> Iterator[str]:
    """A table of every tensor that is not equal; nothing where all are."""
    rows = [
        [layout.layout, mode.mode, f"`{tensor.name}`", *_figures(tensor.whole)[1:], _first_step(tensor), tensor.whole.note]
        for layout in report.layouts
        for mode in layout.modes
        for tensor in mode.differing
    ]
    if rows:
        yield "## What is not exact"
        header = ["layout", "mode", "tensor", "max abs", "mean abs", "min cosine", "first differing step", "note"]
        yield _table(header, rows, left=3)


def _first_step(tensor: TensorParity) -> str:
    return "-" if tensor.whole.first_step is None else str(tensor.whole.first_step)


def _facts_table(report: ParityReport) -> str:
    facts = {**report.configuration, **report.machine, "date": report.date}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return _table(["setting", "value"], [[name, _cell(value)] for name, value in facts.items()], left=2)


def _details(report: ParityReport) -> Iterator[str]:
    """One folded section for all layouts that have the same figures."""
    groups: dict[str, list[LayoutParity]] = {}
    for layout in report.layouts:
        body = [f"It failed: {_line(layout.error)}"] if layout.error is not None else []
        body += [_figures_table(layout.modes)] if layout.modes else []
        groups.setdefault("\n\n".join(body), []).append(layout)
    for text, layouts in groups.items():
        names = ", ".join(layout.layout for layout in layouts)
        title = f"{names}: {_word(layouts[0].is_exact)}, {layouts[0].num_compared} tensors{' each' if len(layouts) > 1 else ''}"
        yield f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _figures_table(modes: Sequence[ModeParity]) -> str:
    """One row per tensor and figures; modes that agree share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(tensor.name for mode in modes for tensor in mode.tensors):
        for mode in modes:
            for tensor in mode.tensors:
                if tensor.name == name:
                    first = _figures(tensor.first) if tensor.first else ["-"] * 4
                    rows.setdefault((f"`{name}`", *first, *_figures(tensor.whole)), []).append(mode.mode)
    figures = ["max abs", "mean abs", "min cosine"]
    header = ["tensor", "modes", "first step: equal", *figures, "all steps: equal", *figures]
    return _table(header, [[name, ", ".join(shared), *cells] for (name, *cells), shared in rows.items()], left=2)


def _figures(measure: Measure) -> list[str]:
    return [
        "yes" if measure.equal else "**no**",
        format_difference(measure.max_abs),
        format_difference(measure.mean_abs),
        format_cosine(measure.min_cosine),
    ]


def format_difference(value: Number | None) -> str:
    """Two digits; 0 only if it is 0."""
    if value is None:
        return "-"
    return f"{value:.1e}" if value else "0"


def format_cosine(value: Number | None) -> str:
    """Near 1, how much it lacks; 1 only if it is 1."""
    if value is None:
        return "-"
    if value == 1:
        return "1"
    return f"1 - {1 - value:.1e}" if 0.999 < value < 1 else f"{value:.4f}"


def _received(layout: LayoutParity, axis: str) -> Number:
    if not layout.modes:
        return 0.0
    return sum(mode.received_bytes_per_step.get(axis, 0.0) for mode in layout.modes) / len(layout.modes)


def _weights(report: ParityReport, count: int) -> str:
    if not count:
        return "-"
    return f"{_bytes(count)} ({count / report.transformer_bytes:.0%})" if report.transformer_bytes else _bytes(count)


def _bytes(count: Number) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B" if count else "0"


def _word(is_exact: bool) -> str:
    return "exact" if is_exact else "not exact"


def _line(text: str) -> str:
    """On one line, so that it stays in its paragraph."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table, also readable as plain text; the first `left` columns are flushed left."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * max(3, width) if column < left else "-" * max(2, width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *(line(row) for row in rows)])
