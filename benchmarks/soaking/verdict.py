"""What is promised of a server at the end of its soak, and how the results are written down."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.soaking.books import Books, ServerCounts, imbalances
from benchmarks.soaking.watch import Holding, Slope, slope

# Rests below which a slope says nothing.
_ENOUGH = 8
_COLOURS = ("#3366cc", "#d9480f")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One thing that must hold.

    Attributes:
        name: What.
        is_kept: Whether it does.
        shown: The figures.
    """

    name: str
    is_kept: bool
    shown: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """Everything known of one server at the end.

    Attributes:
        family: What it served.
        books: The books of its clients.
        counts: Its own, at the end.
        watched: While it ran.
        rests: What it held at rest, after the warm-up and then all along.
        errors: Lines of its log that tell of an error.
    """

    family: str
    books: Books
    counts: ServerCounts
    watched: Sequence[Holding]
    rests: Sequence[Holding]
    errors: Sequence[str]

    def slope(self, name: str) -> Slope | None:
        """Of a column of what was held at rest; None where there were few rests."""
        if len(self.rests) < _ENOUGH:
            return None
        return slope([each.minute for each in self.rests], [getattr(each, name) for each in self.rests])

    def _flat(self, what: str, name: str, most: float = 0.0, unit: str = "") -> Promise:
        found = self.slope(name)
        values = [getattr(each, name) for each in self.rests]
        shown = f"at rest {values[0]} after the warm-up, {values[-1]} at the end, {min(values)} to {max(values)}{unit}"
        is_kept = found is None or found.low <= 0 or found.high < most
        return Promise(name=f"{what} flat", is_kept=is_kept, shown=f"{shown}; slope {found or 'not judged: too short'}")

    def promises(self, most_kib_per_minute: float) -> list[Promise]:
        """What must hold."""
        books = self.books
        uneven = imbalances(books, self.counts)
        return [
            Promise(
                name="checked samples have the bits of the same request run alone; no answer that its request may not get",
                is_kept=not books.wrong and books.checked > 0,
                shown=f"{books.checked} of {books.samples} samples checked; {len(books.wrong)} wrong",
            ),
            Promise(name="counters balance, with the clients' too", is_kept=not uneven, shown="; ".join(uneven) or "exactly"),
            self._flat("file descriptors are", "fds"),
            self._flat("threads are", "threads"),
            self._flat(f"memory is (bound {most_kib_per_minute:g})", "rss_kib", most_kib_per_minute, " KiB"),
            Promise(
                name="no error in the log",
                is_kept=not self.errors,
                shown=f"{len(self.errors)} lines; {self.errors[0][:200]}" if self.errors else "none",
            ),
        ]


def section(soaked: Soaked, promises: Sequence[Promise]) -> str:
    """One server's results as Markdown."""
    books, began = soaked.books, soaked.rests[0].minute
    at_rest = ", ".join(f"{each.rss_kib / 1024:.1f}" for each in soaked.rests)
    rss = [each.rss_kib / 1024 for each in soaked.watched if each.minute >= began] or [math.nan]
    return "\n".join(
        [
            f"## {soaked.family}",
            "",
            "| promise | kept | figures |",
            "|---|---|---|",
            *(f"| {each.name} | {'yes' if each.is_kept else '**no**'} | {each.shown} |" for each in promises),
            "",
            f"- Requests: {books.sent}. Answers: {_listed(books.answers)}. Left by their client while they waited: "
            f"{books.left_waiting}, while it sent: {books.left_sending}.",
            f"- What clients did: {_listed(books.behaviours)}.",
            f"- The server's count: accepted {soaked.counts.accepted}, completed {soaked.counts.completed}, failed: "
            f"{_listed(soaked.counts.failed) or 'none'}. Weight updates: {books.updates}; pauses: {books.pauses}.",
            f"- /liveness: {_latency(books.alive_s)}. Answers held at most: {books.held_bytes / 2**20:.1f} MiB.",
            f"- Resident memory under load, from minute {began:.1f} on: median {statistics.median(rss):.1f} MiB, lowest "
            f"{min(rss):.1f}, highest {max(rss):.1f}; at rest: {at_rest}.",
        ]
    )


def _latency(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return "not measured"
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    median_ms, p99_ms, most_ms = (1000 * each for each in (cuts[49], cuts[98], max(seconds)))
    return f"{len(seconds)} times, median {median_ms:.1f} ms, p99 {p99_ms:.1f} ms, most {most_ms:.1f} ms"


def chart(soaked: Sequence[Soaked], path: Path) -> None:
    """Memory and file descriptors over time, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, files = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2, 1)})
    for each, colour in zip(soaked, _COLOURS, strict=False):
        minutes = [one.minute for one in each.watched]
        style: dict[str, Any] = {"color": colour, "linewidth": 1.0, "label": each.family}
        memory.plot(minutes, [one.rss_kib / 1024 for one in each.watched], **style)
        files.plot(minutes, [one.fds for one in each.watched], **style)
        memory.plot(
            [one.minute for one in each.rests], [one.rss_kib / 1024 for one in each.rests], "o", markersize=3.5, color=colour
        )
    memory.set(ylabel="resident memory, MiB", title="Soak: dots are at rest, where memory is judged")
    files.set(ylabel="file descriptors", xlabel="minutes")
    for axes in (memory, files):
        axes.set_ylim(bottom=0)
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
