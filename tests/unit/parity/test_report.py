import json
import math
import re
from dataclasses import replace

import pytest
from tests.unit.parity.reports import EQUAL, OFF, make_layout, make_mode, make_report

from flowroll.parity.report import format_cosine, format_difference, to_json, to_markdown, verdict, write_report

EXACT = make_layout("sp2", make_mode("sde", image=EQUAL, latents=EQUAL), make_mode("ode", image=EQUAL, latents=EQUAL))
BROKEN = make_layout("tp2", make_mode("sde", image=EQUAL, latents=OFF), make_mode("ode", image=EQUAL, latents=EQUAL))
FAILED = make_layout("sp3", error="rank 1 must live, got its end by signal 9;\nsee the log.")


def test_the_verdict_comes_first_and_names_what_was_exact():
    title, _, second = to_markdown(make_report(EXACT)).split("\n")[:3]
    assert title == "# Parity of tiny, float32: exact"
    assert second.startswith("**Exact: 1 of 1 layouts** (sp2). In each, all 4 tensors that were compared")


def test_the_verdict_names_every_tensor_that_was_not():
    text = verdict(make_report(EXACT, BROKEN))
    assert "**Exact: 1 of 2 layouts** (sp2)." in text
    assert "**Not exact: tp2.** sde: 1 of 2 tensors differ (`latents`)." in text


def test_a_failed_layout_shows_its_error_on_one_line():
    report = make_report(EXACT, FAILED)
    assert report.is_exact is False
    text = to_markdown(report)
    assert "**Not exact: sp3.** It failed: rank 1 must live, got its end by signal 9; see the log." in text
    [row] = [line for line in text.splitlines() if line.startswith("| sp3 ")]
    assert row.count("failed") == 2


def test_nothing_exact_is_said_too():
    assert verdict(make_report(BROKEN)).startswith("**Exact: none of 1 layouts.**")


def test_an_axis_on_which_nothing_moved_is_said():
    text = verdict(make_report(replace(EXACT, layout="cfg2", idle_axes=("cfg",))))
    assert "cfg2: no byte moved on cfg, so nothing was shared out there" in text


def test_the_table_of_differences_is_there_only_if_there_are_any():
    assert "## What is not exact" not in to_markdown(make_report(EXACT))
    text = to_markdown(make_report(BROKEN)).split("## What is not exact")[1].split("##")[0]
    [row] = [line for line in text.splitlines() if line.startswith("| tp2")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("tp2", "sde", "`latents`", "3.0e-07", "1.2e-08", "1 - 4.0e-13", "2", "")
    ]


def test_weights_and_traffic_are_shown_per_layout():
    [row] = [line for line in to_markdown(make_report(EXACT)).splitlines() if line.startswith("| sp2 ")]
    assert "all 2 equal" in row
    assert "1.0 MiB (50%)" in row
    assert "1.5 KiB" in row


def test_layouts_with_the_same_figures_share_a_table_and_modes_a_row():
    text = to_markdown(make_report(EXACT, replace(EXACT, layout="sp4"), BROKEN))
    assert text.count("<details>") == 2
    assert "<summary>sp2, sp4: exact, 4 tensors each</summary>" in text
    assert len(re.findall(r"\| `latents` +\| sde, ode \|", text)) == 1
    assert len(re.findall(r"\| `latents` +\| sde +\|", text)) == 1


def test_every_table_is_well_formed():
    for block in to_markdown(make_report(EXACT, BROKEN, FAILED)).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_the_json_has_every_figure():
    value = json.loads(to_json(make_report(EXACT, BROKEN)))
    assert value["is_exact"] is False
    assert [layout["is_exact"] for layout in value["layouts"]] == [True, False]
    latents = value["layouts"][1]["modes"][0]["tensors"][1]
    assert latents["name"] == "latents"
    assert latents["first"]["equal"] is True
    assert latents["whole"] == {
        "equal": False,
        "max_abs": 3e-7,
        "mean_abs": 1.25e-8,
        "min_cosine": 1 - 4e-13,
        "first_step": 2,
        "note": "",
    }
    assert value["layouts"][0]["modes"][0]["received_bytes_per_step"]["sp"] == 1536
    assert value["versions"] == {"torch": "2.13.0"}


def test_a_nan_makes_no_invalid_json():
    report = make_report(make_layout("sp2", make_mode("sde", image=replace(OFF, max_abs=math.nan))))
    assert json.loads(to_json(report))["layouts"][0]["modes"][0]["tensors"][0]["whole"]["max_abs"] is None
    assert "nan" in to_markdown(report)


def test_both_forms_are_written(tmp_path):
    report = make_report(EXACT)
    markdown, data = write_report(report, tmp_path)
    assert markdown.read_text() == to_markdown(report)
    assert data.read_text() == to_json(report)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (1.0, "1.0e+00"), (1e-300, "1.0e-300"), (None, "-"), (math.nan, "nan")]
)
def test_a_difference_is_0_only_if_it_is_0(value, shown):
    assert format_difference(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1"), (1 - 2e-16, "1 - 2.2e-16"), (0.5, "0.5000"), (-0.25, "-0.2500"), (None, "-"), (math.nan, "nan")],
)
def test_a_cosine_is_1_only_if_it_is_1(value, shown):
    assert format_cosine(value) == shown
