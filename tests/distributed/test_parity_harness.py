"""The harness with real processes: green on a healthy layout, red on each of three faults that every rank shares."""

import json
import sys
from pathlib import Path

import pytest
from tests.unit.cli.invoking import run_cli

from flowroll.parity import run

# 144 image tokens: two ranks share them, unevenly.
SMALL = ("--size", 192, "--steps", 3, "--threads", 1, "--dtype", "float32")


def parity(folder, checkpoint, *words):
    result = run_cli("parity", checkpoint, *SMALL, *words, "--out", folder)
    return result, json.loads((folder / "parity.json").read_text()), (folder / "parity.md").read_text()


@pytest.fixture(scope="module")
def broken(qwen_checkpoint, tmp_path_factory):
    """A run in which every layout has a fault of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CHILD_COMMAND", (sys.executable, str(Path(__file__).with_name("broken_child.py"))))
        words = ("--layouts", "sp2,tp2,cfg2", "--modes", "sde", "--device", "cpu")
        return parity(tmp_path_factory.mktemp("broken"), qwen_checkpoint, *words)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)])
def test_a_healthy_layout_is_exact_and_the_status_is_0(device, z_image_checkpoint, tmp_path):
    words = ("--layouts", "sp2", "--modes", "sde,ode", "--num-outputs", 2, "--guidance-scale", 2, "--device", device)
    result, report, markdown = parity(tmp_path, z_image_checkpoint, *words)
    assert result.exit_code == 0, result.output
    assert report["is_exact"] is True
    [sp2] = report["layouts"]
    assert [mode["mode"] for mode in sp2["modes"]] == ["sde", "ode"]
    for mode in sp2["modes"]:
        assert mode["received_bytes_per_step"]["sp"] > 0  # rows were really shared out
        assert all(tensor["whole"]["equal"] for tensor in mode["tensors"])
    assert "**Exact: 1 of 1 layouts** (sp2)" in markdown
    assert "exact" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity.json", "parity.md"]


@pytest.mark.parametrize(
    ("fault", "layout", "origin", "untouched"),
    [
        ("keys permuted", "sp2", "model_output", "variance_noise"),
        ("noise drawn per shard", "tp2", "variance_noise", "noise_std_dev"),
        ("std in bfloat16", "cfg2", "latents", "noise_std_dev"),
    ],
)
def test_a_fault_that_all_ranks_share_turns_the_report_red(fault, layout, origin, untouched, broken):
    result, report, markdown = broken
    assert result.exit_code == 1, result.output
    assert report["is_exact"] is False
    [found] = [each for each in report["layouts"] if each["layout"] == layout]
    # The comparison is what is red: the ranks agree with each other, and nothing failed.
    assert found["error"] is None
    assert found["is_exact"] is False
    differing = {tensor["name"] for tensor in found["modes"][0]["tensors"] if not tensor["whole"]["equal"]}
    assert {origin, "latents", "image"} <= differing
    assert untouched not in differing
    assert f"**Not exact: {layout}.** sde: {len(differing)} of " in markdown
