"""What a training run writes down: a CSV row per round, the reward curve, and pictures of before and after."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _FAINT, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_COLOURS = ("#3366cc", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#c2255c", "#6b7280")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One round.

    Attributes:
        round: Counted from 0; the last row is the state after the last update.
        reward: Mean over the round's rollouts; None in the last row, which has none.
        evaluation: Mean over one deterministic sample of every prompt; None where it was not taken.
        ratio_error: Largest |ratio - 1| before the round's first update.
        seconds: Since the start.
    """

    round: int
    reward: float | None = None
    evaluation: float | None = None
    ratio_error: float | None = None
    seconds: float


class Journal:
    """Appends rows to a CSV file; a run that is cut off leaves the rounds that it made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        path.write_text(",".join(field.name for field in fields(Row)) + "\n")

    def add(self, row: Row) -> None:
        """Writes the row."""
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(["" if value is None else value for value in asdict(row).values()])

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Round and evaluation, where one was taken."""
        return [(row.round, row.evaluation) for row in self.rows if row.evaluation is not None]


def read_rows(path: Path) -> list[Row]:
    """The rows of a journal's CSV file."""
    with path.open(newline="") as file:
        return [
            Row(
                round=int(row["round"]),
                reward=_number(row["reward"]),
                evaluation=_number(row["evaluation"]),
                ratio_error=_number(row["ratio_error"]),
                seconds=float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        ]


def plot(runs: Mapping[str, Sequence[Row]], path: Path, *, title: str) -> None:
    """Writes a PNG: rewards of the rounds (dots), evaluations (lines), one colour per run."""
    figure = Figure(figsize=(8.0, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, rows) in enumerate(runs.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        rounds = [(row.round, row.reward) for row in rows if row.reward is not None]
        evaluations = [(row.round, row.evaluation) for row in rows if row.evaluation is not None]
        axes.plot(*zip(*rounds, strict=True), ".", markersize=3, alpha=0.5, color=colour)
        axes.plot(*zip(*evaluations, strict=True), "o-", markersize=4, linewidth=1.8, color=colour, label=label)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=12)
    axes.set_xlabel("round (one update of the server's weights each)", color=_FAINT)
    axes.set_ylabel("mean reward", color=_FAINT)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def _number(text: str) -> float | None:
    return float(text) if text else None
