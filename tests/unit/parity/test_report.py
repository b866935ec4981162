import json
import math
import re
from dataclasses import replace

import pytest
from tests.unit.parity.reports import EQUAL, OFF, make_layout, make_mode, make_report

from flowroll.parity.report import shown_cosine, shown_difference, summary, to_json, to_markdown

EXACT = make_layout("sp2", make_mode("sde", image=EQUAL, latents=EQUAL), make_mode("ode", image=EQUAL, latents=EQUAL))
BROKEN = make_layout("tp2", make_mode("sde", image=EQUAL, latents=OFF), make_mode("ode", image=EQUAL, latents=EQUAL))
FAILED = make_layout("sp3", error="rank 1 must live, got its end by signal 9;\nsee the log.")


def rows_of(text, start):
    """The cells of the table rows that start so."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_verdict_comes_first_and_names_what_was_exact():
    title, _, second = to_markdown(make_report(EXACT)).split("\n")[:3]
    assert title == "# Parity of tiny, float32: exact"
    assert second == "**Exact: 1 of 1 layouts** (sp2)."


def test_the_verdict_names_every_tensor_that_was_not():
    text = summary(make_report(EXACT, BROKEN))
    assert "**Exact: 1 of 2 layouts** (sp2)." in text
    assert "**Not exact: tp2.** 1 of 4 differ: `latents` (sde)." in text
    assert summary(make_report(BROKEN)).startswith("**Exact: 0 of 1 layouts**.")


def test_a_failed_layout_shows_its_error_on_one_line():
    report = make_report(EXACT, FAILED)
    assert report.is_exact is False
    text = to_markdown(report)
    assert "**Failed: sp3.** rank 1 must live, got its end by signal 9; see the log." in text
    assert rows_of(text, "sp3 ")[0][2:4] == ["failed", "failed"]


def test_an_axis_on_which_nothing_moved_is_said():
    assert "cfg2: no byte moved on cfg, so nothing was shared out there" in summary(make_report(replace(EXACT, layout="cfg2")))
    assert "no byte moved" not in summary(make_report(EXACT))


def test_weights_and_traffic_are_shown_per_layout():
    text = to_markdown(make_report(EXACT))
    [reference], [row] = rows_of(text, "one rank "), rows_of(text, "sp2 ")
    assert reference[2:5] == ["reference", "reference", "2.0 MiB"]
    assert row[1:6] == ["2", "all 2 equal", "all 2 equal", "1.0 MiB", "1.5 KiB"]


def test_every_figure_of_a_tensor_that_is_off_is_shown():
    [row] = [row for row in rows_of(to_markdown(make_report(BROKEN)), "`latents`") if row[1] == "sde"]
    assert row == ["`latents`", "sde", "yes", "0", "1", "**no**", "3.0e-07", "1.2e-08", "1 - 4.0e-13", "2"]


def test_layouts_with_the_same_figures_share_a_table_and_modes_a_row():
    text = to_markdown(make_report(EXACT, replace(EXACT, layout="sp4"), BROKEN))
    assert re.findall("### .*", text) == ["### sp2, sp4", "### tp2"]
    assert [row[1] for row in rows_of(text, "`latents`")] == ["sde, ode", "sde", "ode"]


def test_every_table_is_well_formed():
    for block in to_markdown(make_report(EXACT, BROKEN, FAILED)).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_the_json_has_every_figure():
    value = json.loads(to_json(make_report(EXACT, BROKEN)))
    assert value["is_exact"] is False
    assert [layout["is_exact"] for layout in value["layouts"]] == [True, False]
    latents = value["layouts"][1]["tensors"][1]
    assert (latents["mode"], latents["name"], latents["first"]["equal"]) == ("sde", "latents", True)
    figures = {"max_abs": 3e-7, "mean_abs": 1.25e-8, "min_cosine": 1 - 4e-13, "first_step": 2}
    assert latents["whole"] == {"equal": False, **figures, "note": ""}
    assert value["layouts"][0]["received_bytes"]["sp"] == 1536


def test_a_nan_makes_no_invalid_json():
    report = make_report(make_layout("sp2", make_mode("sde", image=replace(OFF, max_abs=math.nan))))
    assert json.loads(to_json(report))["layouts"][0]["tensors"][0]["whole"]["max_abs"] is None
    assert "nan" in to_markdown(report)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (1.0, "1.0e+00"), (1e-300, "1.0e-300"), (None, "-"), (math.nan, "nan")]
)
def test_a_difference_is_0_only_if_it_is_0(value, shown):
    assert shown_difference(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1"), (1 - 2e-16, "1 - 2.2e-16"), (0.5, "0.5000"), (-0.25, "-0.2500"), (None, "-"), (math.nan, "nan")],
)
def test_a_cosine_is_1_only_if_it_is_1(value, shown):
    assert shown_cosine(value) == shown
