"""What a training run writes down: a CSV row per round, the reward curve, and pictures of before and after."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flowroll.plots import color_of, line_chart, save_chart


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
    """Appends rows to a CSV file; a run that is cut off leaves the rounds that it made.

    Args:
        path: The file.
        track: Where the rows go too: "tensorboard" (beside the file), "wandb".
        name: Of the run, there.
    """

    def __init__(self, path: Path, *, track: Sequence[str] = (), name: str = "") -> None:
        self.path = path
        self.rows: list[Row] = []
        self._trackers = [_TRACKERS[kind](path.parent, name) for kind in track]
        path.write_text(",".join(field.name for field in fields(Row)) + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close()

    def restore(self, rows: Sequence[Row]) -> None:
        """Writes the rows of an earlier part of the run."""
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Writes the row."""
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(["" if value is None else value for value in asdict(row).values()])
        values = {name: value for name, value in asdict(row).items() if name != "round" and value is not None}
        for tracker in self._trackers:
            tracker.add(row.round, values)

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Round and evaluation, where one was taken."""
        return [(row.round, row.evaluation) for row in self.rows if row.evaluation is not None]


class _TensorBoard:
    """Writes event files beside the CSV file."""

    def __init__(self, folder: Path, name: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SystemExit("--track tensorboard must find tensorboard; pip install tensorboard.") from error
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Sends the rows to W&B, or keeps them in the folder, as its own environment variables say."""

    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SystemExit("--track wandb must find wandb; pip install wandb.") from error
        self._run: Any = wandb.init(project="flowroll", name=name, dir=str(folder))

    def add(self, number: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=number)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: Mapping[str, Callable[[Path, str], _TensorBoard | _WeightsAndBiases]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


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
    figure, axes = line_chart(title, x="round (one update of the server's weights each)", y="mean reward")
    axes.set_ylim(0, 1)
    for index, (label, rows) in enumerate(runs.items()):
        colour = color_of(index)
        rounds = [(row.round, row.reward) for row in rows if row.reward is not None]
        evaluations = [(row.round, row.evaluation) for row in rows if row.evaluation is not None]
        axes.plot(*zip(*rounds, strict=True), ".", markersize=3, alpha=0.5, color=colour)
        axes.plot(*zip(*evaluations, strict=True), "o-", markersize=4, linewidth=1.8, color=colour, label=label)
    save_chart(figure, path)


def _number(text: str) -> float | None:
    return float(text) if text else None
