"""The charts of a page, as SVG: log-probs, ratios and noise, over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from flowroll.plots import chart_svg, line_chart, style_of
from flowroll.viewer.steps import Step

# The steps of several samples, each with its label.
Labelled: TypeAlias = Sequence[tuple[str, Sequence[Step]]]
# A page shows them side by side where it is wide enough.
_SIZE = (5.6, 3.0)


def step_charts(samples: Labelled) -> list[str]:
    """Returns a chart for each number that there is: log-prob, ratio, and the noise of the first sample's steps."""
    charts = [
        _chart("Log-probability per step", "log-prob", samples, lambda step: step.log_prob),
        _chart("Ratio per step, now to recorded", "ratio", samples, lambda step: step.ratio),
    ]
    (_, first), *_ = samples
    noise: list[tuple[str, list[tuple[int, float]]]] = [("noise level sigma", [(step.index, step.sigma) for step in first])]
    if any(step.std for step in first):
        noise.append(("std of the step's noise", [(step.index, step.std) for step in first if step.std is not None]))
    return [*filter(None, charts), _drawn("Noise per step", "of unit latents", noise)]


def _chart(title: str, name: str, samples: Labelled, value_of: Callable[[Step], float | None]) -> str | None:
    lines = [
        (label, [(step.index, value) for step in steps if (value := value_of(step)) is not None]) for label, steps in samples
    ]
    return _drawn(title, name, lines) if any(points for _, points in lines) else None


def _drawn(title: str, name: str, lines: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    figure, axes = line_chart(title, x="step", y=name, size=_SIZE)
    for index, (label, points) in enumerate(lines):
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, **style_of(index))
    # Without an offset, a ratio of exactly 1 reads as 1.
    axes.ticklabel_format(axis="y", useOffset=False)
    return chart_svg(figure)
