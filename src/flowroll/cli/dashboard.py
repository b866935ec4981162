"""Draws the frames of `flowroll top` from what a server reported. It sends no requests itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flowroll.types import Number
from flowroll.types.shown import format_bytes

STAGES = {"queue": "yellow", "encode": "blue", "denoise": "cyan", "decode": "magenta", "serialise": "green", "send": "white"}
# Number of scrapes over which means are taken.
_RECENT = 11
_WIDE, _BAR, _SPARK = 104, 18, 28
_FAINT = "bright_black"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """Holds what GET /metrics said at one time.

    Attributes:
        at_s: When the metrics were read, in seconds of the monotonic clock.
        series: The labels and the value of each sample, by the name of the series.
    """

    at_s: float
    series: Mapping[str, Sequence[tuple[Mapping[str, str], float]]]

    @classmethod
    def read(cls, text: str, at_s: float) -> Scrape:
        """Reads the text of /metrics.

        Raises:
            ValueError: The text is not in Prometheus' format.
        """
        series: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series.setdefault(sample.name, []).append((sample.labels, float(sample.value)))
        return cls(at_s=at_s, series=series)

    def total(self, name: str, **labels: str) -> float:
        """Adds up the samples that have these labels; 0 where there are none."""
        return math.fsum(value for own, value in self.series.get(name, ()) if labels.items() <= own.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happened between two scrapes."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Returns the seconds between the two scrapes."""
        return self.after.at_s - self.before.at_s

    def growth(self, name: str, **labels: str) -> float:
        """Returns by how much a counter grew. A lower value than before means that the server was restarted."""
        before, after = self.before.total(name, **labels), self.after.total(name, **labels)
        return after - before if after >= before else after

    def per_s(self, name: str, **labels: str) -> float:
        """Returns by how much a counter grew per second; 0 without two scrapes."""
        return self.growth(name, **labels) / self.seconds if self.seconds > 0 else 0.0

    def mean(self, total: str, count: str, **labels: str) -> float | None:
        """Returns the growth of one counter divided by that of another; None if the other did not grow."""
        grown = self.growth(count)
        return self.growth(total, **labels) / grown if grown else None


def frame(info: Mapping[str, Any], scrapes: Sequence[Scrape], *, width: int, silent_s: float | None = None) -> RenderableType:
    """Draws one picture of a server.

    Args:
        info: The answer of GET /server_info.
        scrapes: Answers of GET /metrics, oldest first; rates need two.
        width: The number of the terminal's columns.
        silent_s: The seconds for which the server has not answered; None if it answers.
    """
    recent = Change(before=scrapes[-min(len(scrapes), _RECENT)], after=scrapes[-1])
    is_wide = width >= _WIDE
    load, rates = _panel("load", _load(info, recent)), _panel("per second", _rates(scrapes))
    stages = _panel(f"time by stage, last {recent.seconds:.0f} s", _stages(recent))
    # As high as the stages beside it.
    errors = _panel("errors", _errors(recent, most=len(STAGES)), height=len(STAGES) + 2 if is_wide else None)
    if is_wide:
        columns = Table.grid(expand=True)
        columns.add_column(ratio=1)
        columns.add_column(ratio=1)
        columns.add_row(Group(load, errors), Group(rates, stages))
        return Group(_header(info, silent_s), columns, *_replicas(scrapes[-1]), _footer(info, scrapes))
    return Group(_header(info, silent_s), load, rates, stages, errors, *_replicas(scrapes[-1]), _footer(info, scrapes))


def spark(values: Sequence[float], width: int) -> str:
    """Draws the last values as columns. The highest is full, the latest is rightmost, and no value above 0 is invisible."""
    shown = values[-width:]
    most = max(shown, default=0.0)
    return "".join(" ▁▂▃▄▅▆▇█"[max(1, round(8 * value / most)) if value > 0 else 0] for value in shown).rjust(width)


def _panel(title: str, rows: Iterable[Sequence[RenderableType]], *, height: int | None = None) -> Panel:
    """Makes a framed panel; each row is a name, a value in bold at the right, and further columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right", style="bold")
    for row in rows:
        table.add_row(*row)
    return Panel(table, title=f"[bold]{title}", title_align="left", border_style=_FAINT, height=height)


def _replicas(scrape: Scrape) -> Iterator[RenderableType]:
    """Yields a panel with a row for each replica of a fleet; nothing for a single server."""
    rows = []
    for labels, steps in scrape.series.get("flowroll_replica_image_steps", ()):
        own = {"replica": labels["replica"]}
        requests = scrape.total("flowroll_replica_requests", **own)
        shown = f"{_counted(requests, 'request')} · version {scrape.total('flowroll_replica_version_number', **own):.0f}"
        rows.append((labels["replica"], f"{steps:,.0f} steps", f"{shown} · {labels['state']}"))
    if rows:
        yield _panel("replicas, with the steps ahead of them", rows)


def _header(info: Mapping[str, Any], silent_s: float | None) -> RenderableType:
    layout = info["layout"]
    ranks = _counted(layout["sp"] * layout["tp"] * (2 if layout["cfg_parallel"] else 1), "rank")
    facts = f"  {info['family']} {info['variant']} · {info['dtype']} on {info['device']} · {ranks}"
    name = (f"  {PurePath(info['model']).name}", "bold")
    if silent_s is not None:
        state, color = f"no answer for {silent_s:.0f} s", "red"
    elif info["is_ready"]:
        state, color = "ready", "green"
    else:
        state, color = "paused" if info["is_paused"] else "stopping", "yellow"
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column(no_wrap=True)
    title = Text.assemble((" flowroll ", "bold reverse cyan"), name, (facts, _FAINT))
    table.add_row(title, Text(f"● {state} ", f"bold {color}"))
    return table


def _load(info: Mapping[str, Any], recent: Change) -> Iterator[Sequence[RenderableType]]:
    latest, batching = recent.after, info["batching"]
    waiting, room = latest.total("flowroll_queue_depth"), info["max_queue"]
    # A full queue refuses requests.
    alarm = "red" if waiting >= room else "yellow" if waiting >= 0.75 * room else "cyan"
    running, age_s = latest.total("flowroll_running_samples"), latest.total("flowroll_queue_age_seconds")
    together = recent.mean("flowroll_batch_samples_sum", "flowroll_batch_samples_count") or 0.0
    for name, value, shown, most, color in (
        ("running samples", running, f"{running:.0f}", batching["max_running_samples"], "cyan"),
        ("samples a forward", together, f"{together:.1f}", batching["max_batch_samples"], "cyan"),
        ("waiting requests", waiting, f"{waiting:.0f}", room, alarm),
    ):
        yield name, shown, Text(f"of {most}", _FAINT), Bar(most or 1, 0, value, width=_BAR, color=color)
    yield "running requests", f"{latest.total('flowroll_running_requests'):.0f}"
    yield "longest wait", f"{age_s:.1f} s" if age_s >= 0.05 else "-"


def _rates(scrapes: Sequence[Scrape]) -> Iterator[Sequence[RenderableType]]:
    changes = [Change(before=before, after=after) for before, after in itertools.pairwise(scrapes)]
    for name, counter in (
        ("steps", "flowroll_steps_total"),
        ("forwards", "flowroll_batch_samples_count"),
        ("samples", "flowroll_samples_total"),
        ("requests", "flowroll_ended_requests_total"),
        ("bytes out", "flowroll_response_bytes_total"),
    ):
        values = [change.per_s(counter) for change in changes]
        shown = [format_bytes(round(value)) if name == "bytes out" else _number(value) for value in values[-1:]]
        yield name, *(shown or "-"), Text(spark(values, _SPARK), "cyan")


def _stages(recent: Change) -> Iterator[Sequence[RenderableType]]:
    """Returns the mean milliseconds of the requests that ended, by stage."""
    ended, seconds = "flowroll_ended_requests_total", "flowroll_stage_seconds_total"
    means = {stage: recent.mean(seconds, ended, stage=stage) for stage in STAGES}
    whole = sum(mean for mean in means.values() if mean) or 1.0
    for stage, mean in means.items():
        shown = "-" if mean is None else f"{mean * 1000:,.1f} ms".replace(",", " ")
        yield stage, shown, Bar(whole, 0, mean or 0.0, width=_SPARK, color=STAGES[stage])


def _errors(recent: Change, *, most: int) -> Iterator[Sequence[RenderableType]]:
    counts = {labels["code"]: count for labels, count in recent.after.series.get("flowroll_errors_total", ()) if count}
    for code, count in sorted(counts.items(), key=lambda item: -item[1])[:most]:
        rate = recent.per_s("flowroll_errors_total", code=code)
        yield code, _number(count), Text(f"{_number(rate)}/s" if rate else "", "yellow")
    if not counts:
        yield (Text("none so far", _FAINT),)


def _footer(info: Mapping[str, Any], scrapes: Sequence[Scrape]) -> RenderableType:
    latest = scrapes[-1]
    cores = Change(before=scrapes[-min(len(scrapes), 2)], after=latest).per_s("process_cpu_seconds_total")
    completed = latest.total("flowroll_ended_requests_total", outcome="completed")
    updates = latest.total("flowroll_weight_updates_total", outcome="completed")
    minutes, seconds = divmod(int(info["uptime_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (
        f"up {hours} h {minutes:02} min" if hours else f"up {minutes} min {seconds:02} s",
        f"{_counted(completed, 'request')} done",
        f"weights {info['weight_version']}" + (f" ({_counted(updates, 'update')})" if updates else ""),
        f"{format_bytes(round(latest.total('process_resident_memory_bytes')))} resident",
        f"{cores:.1f} cores",
        f"{latest.total('process_open_fds'):.0f} fds",
    )
    return Text(f" {' · '.join(parts)}", _FAINT, no_wrap=True, overflow="ellipsis")


def _number(value: Number) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 100 or value == round(value) else f"{value:.1f}"


def _counted(count: Number, noun: str) -> str:
    return f"{_number(count)} {noun}{'' if count == 1 else 's'}"
