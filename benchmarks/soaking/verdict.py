"""What is promised of a server at the end of its soak, and how the results are written down."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.soaking.books import Books, ServerCounts, imbalances
from benchmarks.soaking.watch import Holding, Slope, slope

# Samples of the steady part below which a slope says nothing.
_ENOUGH = 60
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
        books: Of its clients.
        counts: Its own, at the end.
        watched: While it ran.
        steady_from: Minute from which memory is judged.
        rest_before: What it held at rest after the warm-up.
        rest_after: What it held at rest at the end.
        errors: Lines of its log that tell of an error.
    """

    family: str
    books: Books
    counts: ServerCounts
    watched: Sequence[Holding]
    steady_from: float
    rest_before: Holding
    rest_after: Holding
    errors: Sequence[str]

    def slope(self, name: str) -> Slope | None:
        """Of a column of what was watched, in the steady part; None where that is too short."""
        steady = [each for each in self.watched if each.minute >= self.steady_from]
        if len(steady) < _ENOUGH:
            return None
        return slope([each.minute for each in steady], [getattr(each, name) for each in steady])

    def promises(self, most_kib_per_minute: float) -> list[Promise]:
        """What must hold."""
        books, before, after = self.books, self.rest_before, self.rest_after
        uneven = imbalances(books, self.counts)
        memory, threads, fds = self.slope("rss_kib"), self.slope("threads"), self.slope("fds")
        minutes = self.watched[-1].minute - self.steady_from
        return [
            Promise(
                name="checked samples have the bits of the same request run alone; no answer that its request may not get",
                is_kept=not books.wrong and books.checked > 0,
                shown=f"{books.checked} of {books.samples} samples checked; {len(books.wrong)} wrong",
            ),
            Promise(name="counters balance, with the clients' too", is_kept=not uneven, shown="; ".join(uneven) or "exactly"),
            Promise(
                name="file descriptors are flat",
                is_kept=after.fds <= before.fds,
                shown=f"at rest {before.fds} after the warm-up, {after.fds} at the end; slope {fds or 'not judged'}",
            ),
            Promise(
                name="threads are flat",
                is_kept=threads is None or threads.low * minutes < 1,
                shown=f"at most {max(each.threads for each in self.watched)}; slope {threads or 'not judged: too short'}",
            ),
            Promise(
                name=f"memory is flat: the slope lies below {most_kib_per_minute:g} KiB a minute",
                is_kept=memory is None or memory.high < most_kib_per_minute,
                shown=f"slope {memory} KiB a minute" if memory else "not judged: too short",
            ),
            Promise(
                name="no error in the log",
                is_kept=not self.errors,
                shown=f"{len(self.errors)} lines; {self.errors[0][:200]}" if self.errors else "none",
            ),
        ]


def section(soaked: Soaked, promises: Sequence[Promise]) -> str:
    """One server's results as Markdown."""
    books, steady = soaked.books, [each for each in soaked.watched if each.minute >= soaked.steady_from]
    rss = [each.rss_kib / 1024 for each in steady or soaked.watched]
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
            f"- Resident memory from minute {soaked.steady_from:.1f} on: median {statistics.median(rss):.1f} MiB, lowest "
            f"{min(rss):.1f}, highest {max(rss):.1f}; at rest {soaked.rest_before.rss_kib / 1024:.1f} after the warm-up, "
            f"{soaked.rest_after.rss_kib / 1024:.1f} at the end.",
        ]
    )


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
        memory.axvline(each.steady_from, color="#6b7280", linewidth=0.8, linestyle=":")
    memory.set(ylabel="resident memory, MiB", title="Soak: memory is judged right of the dotted line")
    files.set(ylabel="file descriptors", xlabel="minutes")
    for axes in (memory, files):
        axes.set_ylim(bottom=0)
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
