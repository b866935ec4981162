"""Draws pictures about rollouts: the log-probs of every step, and contact sheets of pictures through the steps.

matplotlib is imported on use, and without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.extras import extra_for
from flowroll.types import Rollout

_INK, _FAINT, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_COLORS = ("#3366cc", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#c2255c", "#5c940d", "#364fc7")
# Samples of one group have nearly the same log-probs: rings around dots, dashes over lines keep all of them visible.
_STYLES: tuple[dict[str, Any], ...] = (
    {"linestyle": "-", "marker": "o", "markersize": 9, "markerfacecolor": "none"},
    {"linestyle": "--", "marker": "o", "markersize": 4},
    {"linestyle": "-", "marker": "s", "markersize": 9, "markerfacecolor": "none"},
    {"linestyle": "--", "marker": "s", "markersize": 4},
    {"linestyle": "-", "marker": "^", "markersize": 9, "markerfacecolor": "none"},
    {"linestyle": "--", "marker": "^", "markersize": 4},
)
_DPI = 150
# Settings of matplotlib are global while they hold.
_SETTING = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactRow:
    """Describes one sample of a contact sheet.

    Attributes:
        label: What the sample is.
        images: One picture per column, in [0, 1].
    """

    label: str
    images: Sequence[Float[Tensor, " colors 1 height width"]]


def plot_log_probs(series: Sequence[tuple[str, Rollout]], path: Path, *, title: str = "Log-probability per step") -> None:
    """Writes a PNG with the log-probs of the stochastic steps over the step number, one line per rollout.

    Args:
        series: Label and rollout.
        path: Where to write.
        title: Above the plot.

    Raises:
        InvalidRequestError: A rollout has no log-probs.
    """
    figure, axes = line_chart(title, x="step", y="mean log-prob per element")
    for index, (label, rollout) in enumerate(series):
        if rollout.log_probs is None:
            raise InvalidRequestError(f"a plot must have log-probs, got an evaluation for {label}; roll out with rollout=True.")
        steps = list(rollout.sde_step_indices or ())
        values = rollout.log_probs[steps].tolist()
        axes.plot(steps, values, label=label, **style_of(index))
    save_chart(figure, path)


def line_chart(title: str, *, x: str, y: str, size: tuple[float, float] = (8.0, 4.5)) -> tuple[Any, Any]:
    """Makes an empty chart over whole numbers, to draw labelled lines in: its figure and axes; `save_chart` writes it.

    Args:
        title: Above the chart.
        x: Name of the whole numbers.
        y: Name of the values.
        size: Width and height in inches.
    """
    with extra_for("A plot", "plot"):
        from matplotlib.ticker import MaxNLocator

    figure = _figure(*size)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=12)
    axes.set_xlabel(x, color=_FAINT)
    axes.set_ylabel(y, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    return figure, axes


def save_chart(figure: Any, path: Path) -> None:
    """Writes a chart of `line_chart` as a PNG, its legend beside it."""
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", facecolor="white")


def chart_svg(figure: Any) -> str:
    """Returns a chart of `line_chart` as SVG to stand in a page, its text as text."""
    from matplotlib import rc_context

    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=_INK)
    written = io.StringIO()
    with _SETTING, rc_context({"svg.fonttype": "none", "svg.hashsalt": "flowroll"}):
        figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def style_of(index: int) -> dict[str, Any]:
    """Returns how a chart's line is drawn: its color, dashes and marks, as arguments of `plot`."""
    return {"linewidth": 1.5, "color": color_of(index), **_STYLES[index % len(_STYLES)]}


def color_of(index: int) -> str:
    """Returns the color of a chart's line."""
    return _COLORS[index % len(_COLORS)]


def contact_sheet(rows: Sequence[ContactRow], captions: Sequence[str], path: Path, *, title: str) -> None:
    """Writes a PNG grid: one row per sample, one captioned column per step.

    Args:
        rows: Every row has one picture per caption.
        captions: Above the columns.
        path: Where to write.
        title: Above the grid.
    """
    assert rows and all(len(row.images) == len(captions) for row in rows)
    cell, gap, label_width, head = 1.25, 0.06, 1.4, 0.62
    width = label_width + len(captions) * (cell + gap) + gap
    height = head + len(rows) * (cell + gap) + gap
    figure = _figure(width, height)
    figure.text(gap / width, 1 - 0.12 / height, title, ha="left", va="top", fontsize=11, color=_INK)
    for r, row in enumerate(rows):
        bottom = (height - head - (r + 1) * (cell + gap) + gap) / height
        figure.text(gap / width, bottom + cell / 2 / height, row.label, ha="left", va="center", fontsize=8, color=_INK)
        for c, image in enumerate(row.images):
            left = (label_width + c * (cell + gap)) / width
            axes = figure.add_axes((left, bottom, cell / width, cell / height))
            axes.imshow(image[:, 0].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest", aspect="equal")
            axes.set_axis_off()
            if r == 0:
                axes.set_title(captions[c], fontsize=8, color=_FAINT, pad=5)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def _figure(width: float, height: float) -> Any:
    """Makes an empty figure; sizes are in inches."""
    with extra_for("A plot", "plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure
