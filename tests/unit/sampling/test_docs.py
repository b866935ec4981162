"""The table of docs/math.md is what the registry says."""

from pathlib import Path

import pytest
import torch

from flowroll.sampling.dynamics import DYNAMICS, transitions
from flowroll.sampling.transition import GAUSSIAN, NO_CONST

MATH = Path(__file__).parents[3] / "docs" / "math.md"
STEPS = {(True, True): "all", (True, False): "all but the last", (False, False): "none"}


@pytest.mark.parametrize("name", DYNAMICS)
def test_the_docs_give_names_limits_and_densities(name: str) -> None:
    found = DYNAMICS[name]
    first, *_, last = transitions(torch.tensor([1.0, 0.75, 0.4, 0.0]), sde_type=name, noise_level=0.7)
    form = {GAUSSIAN: "Gaussian", NO_CONST: "without constants"}[found.log_prob_form] if found.is_stochastic else "none"
    level = f"0, or {found.noise_level_range}" if found.is_stochastic else "no effect"
    alias = ", ".join(f"`{alias}`" for alias in found.aliases)
    row = (f"`{name}`", alias, found.summary, level, STEPS[first.is_stochastic, last.is_stochastic], form)
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in MATH.read_text().splitlines() if "|" in line]
    assert row in rows
