"""What `flowroll top` shows: one frame from what was seen of a server. Draws, and asks nobody."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flowroll.cli.output import format_bytes
from flowroll.cli.scrape import Change, Scrape
from flowroll.types import Number

STAGES = ("queue", "encode", "denoise", "decode", "serialise", "send")
# Looks over which what is not a rate of this second is taken together.
RECENT = 11
_WIDE = 104
# Columns of a panel that are no bar, and the codes that fit beside the stages.
_FRAME, _MOST_CODES = 4, len(STAGES)
_EIGHTHS, _HEIGHTS = " ▏▎▍▌▋▊▉█", " ▁▂▃▄▅▆▇█"
_FAINT, _ACCENT, _GOOD, _WARN, _BAD = "bright_black", "cyan", "green", "yellow", "red"
_STAGE_COLOURS = ("yellow", "blue", "cyan", "magenta", "green", "bright_black")


def frame(info: Mapping[str, Any], scrapes: Sequence[Scrape], *, width: int, silent_s: float | None = None) -> RenderableType:
    """One picture of a server.

    Args:
        info: What GET /server_info says.
        scrapes: What was seen, oldest first; rates need two.
        width: Columns of the terminal.
        silent_s: For how long the server has not answered; None: it does.
    """
    recent = Change(before=scrapes[-min(len(scrapes), RECENT)], after=scrapes[-1])
    is_wide = width >= _WIDE
    room = (width // 2 if is_wide else width) - _FRAME
    errors = _panel("errors", _errors(recent), height=_MOST_CODES + 2 if is_wide else None)
    left = [_panel("load", _load(info, scrapes, recent, room)), errors]
    title = f"time by stage, last {recent.seconds:.0f} s"
    right = [_panel("per second", _rates(scrapes, room)), _panel(title, _stages(recent, room))]
    body: RenderableType
    if is_wide:
        columns = Table.grid(expand=True, padding=0)
        columns.add_column(ratio=1)
        columns.add_column(ratio=1)
        columns.add_row(Group(*left), Group(*right))
        body = columns
    else:
        body = Group(left[0], *right, left[1])
    return Group(_header(info, silent_s), body, _footer(info, scrapes))


def bar(share: float, width: int) -> str:
    """A bar of that many columns, to the eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def spark(values: Sequence[float], width: int) -> str:
    """The last values as columns, the highest full; the latest is rightmost."""
    shown = values[-width:]
    top = max(shown, default=0.0)
    # What is above nothing is seen to be.
    heights = [0 if value <= 0 else max(1, round(8 * value / top)) for value in shown]
    return "".join(_HEIGHTS[height] for height in heights).rjust(width)


def _panel(title: str, content: RenderableType, *, height: int | None = None) -> Panel:
    return Panel(
        content, title=Text(title, style="bold"), title_align="left", box=box.ROUNDED, border_style=_FAINT, height=height
    )


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for each in justify:
        table.add_column(justify=each, no_wrap=True)  # type: ignore[arg-type]
    return table


def _header(info: Mapping[str, Any], silent_s: float | None) -> RenderableType:
    layout = info["layout"]
    ranks = layout["sp"] * layout["tp"] * (2 if layout["cfg_parallel"] else 1)
    facts = (f"{info['family']} {info['variant']}", f"{info['dtype']} on {info['device']}", _counted(ranks, "rank"))
    left = Text.assemble(
        (" flowroll ", f"bold reverse {_ACCENT}"),
        ("  " + PurePath(info["model"]).name, "bold"),
        ("  " + " · ".join(facts), _FAINT),
    )
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_row(left, _state(info, silent_s))
    return table


def _state(info: Mapping[str, Any], silent_s: float | None) -> Text:
    if silent_s is not None:
        return Text(f"● no answer for {silent_s:.0f} s ", f"bold {_BAD}")
    if info["is_paused"]:
        return Text("● paused ", f"bold {_WARN}")
    return Text("● ready ", f"bold {_GOOD}") if info["is_ready"] else Text("● stopping ", f"bold {_WARN}")


def _load(info: Mapping[str, Any], scrapes: Sequence[Scrape], recent: Change, room: int) -> RenderableType:
    latest, batching = scrapes[-1], info["batching"]
    occupancy = recent.mean("flowroll_batch_samples_sum", "flowroll_batch_samples_count")
    rows = (
        ("running samples", latest.total("flowroll_running_samples"), batching["max_running_samples"], "{:.0f}", _ACCENT),
        ("samples a forward", occupancy or 0.0, batching["max_batch_samples"], "{:.1f}", _ACCENT),
        ("waiting requests", latest.total("flowroll_queue_depth"), info["max_queue"], "{:.0f}", None),
    )
    table = _grid("left", "right", "left", "left")
    for name, value, most, shape, colour in rows:
        share = value / most if most else float(value > 0)
        filled = Text(bar(share, min(room - 34, 40)), colour or _alarm(share))
        table.add_row(name, Text(shape.format(value), "bold"), Text(f"of {most}", _FAINT), filled)
    age_s = latest.total("flowroll_queue_age_seconds")
    table.add_row("running requests", Text(f"{latest.total('flowroll_running_requests'):.0f}", "bold"), "", "")
    table.add_row("longest wait", Text(_seconds(age_s), "bold"), "", "")
    return table


def _rates(scrapes: Sequence[Scrape], room: int) -> RenderableType:
    changes = [Change(before=before, after=after) for before, after in itertools.pairwise(scrapes)]
    rows: tuple[tuple[str, Callable[[Change], float], Callable[[float], str]], ...] = (
        ("steps", lambda change: change.per_s("flowroll_steps_total"), _number),
        ("forwards", lambda change: change.per_s("flowroll_batch_samples_count"), _number),
        ("samples", lambda change: change.per_s("flowroll_samples_total"), _number),
        ("requests", lambda change: change.per_s("flowroll_ended_requests_total"), _number),
        ("bytes out", lambda change: change.per_s("flowroll_response_bytes_total"), lambda value: format_bytes(round(value))),
    )
    table = _grid("left", "right", "left")
    for name, rate, shown in rows:
        values = [rate(change) for change in changes]
        table.add_row(
            name, Text(shown(values[-1]) if values else "-", "bold"), Text(spark(values, min(room - 24, 60)), _ACCENT)
        )
    return table


def _stages(recent: Change, room: int) -> RenderableType:
    """Milliseconds of a request that ended, by stage."""
    ended = "flowroll_ended_requests_total"
    means = {stage: recent.mean("flowroll_stage_seconds_total", ended, stage=stage) for stage in STAGES}
    whole = sum(mean for mean in means.values() if mean)
    table = _grid("left", "right", "left")
    for (stage, mean), colour in zip(means.items(), _STAGE_COLOURS, strict=True):
        shown = "-" if mean is None else f"{mean * 1000:,.1f} ms".replace(",", " ")
        table.add_row(
            stage, Text(shown, "bold"), Text(bar(mean / whole if mean and whole else 0.0, min(room - 26, 40)), colour)
        )
    return table


def _errors(recent: Change) -> RenderableType:
    totals = {code: total for code, total in recent.after.by("flowroll_errors_total", "code").items() if total}
    if not totals:
        return Text("none so far", _FAINT)
    table = _grid("left", "right", "right")
    for code, total in sorted(totals.items(), key=lambda item: -item[1])[:_MOST_CODES]:
        rate = recent.per_s("flowroll_errors_total", code=code)
        style = _WARN if rate else ""
        table.add_row(Text(code, style), Text(_number(total), "bold"), Text(f"{_number(rate)}/s" if rate else "", style))
    return table


def _footer(info: Mapping[str, Any], scrapes: Sequence[Scrape]) -> RenderableType:
    latest, change = scrapes[-1], Change(before=scrapes[-min(len(scrapes), 2)], after=scrapes[-1])
    completed = latest.total("flowroll_ended_requests_total", outcome="completed")
    updates = latest.total("flowroll_weight_updates_total", outcome="completed")
    parts: Iterable[str] = (
        f"up {_duration(info['uptime_s'])}",
        f"{_counted(round(completed), 'request')} done",
        f"weights {info['weight_version']}" + (f" ({_counted(round(updates), 'update')})" if updates else ""),
        f"{format_bytes(round(latest.total('process_resident_memory_bytes')))} resident",
        f"{change.per_s('process_cpu_seconds_total'):.1f} cores",
        f"{latest.total('process_open_fds'):.0f} fds",
    )
    return Text(" " + " · ".join(parts), _FAINT, no_wrap=True, overflow="ellipsis")


def _alarm(share: float) -> str:
    """Of a queue: a full one refuses requests."""
    return _ACCENT if share < 0.75 else _WARN if share < 1 else _BAD


def _number(value: Number) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 100 or value == round(value) else f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.05 else "-"


def _counted(count: int, noun: str) -> str:
    return f"{_number(count)} {noun}{'' if count == 1 else 's'}"


def _duration(seconds: Number) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
