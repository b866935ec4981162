"""The comparison with real ranks: green on a healthy layout, red on each of three faults that every rank shares."""

import json

import pytest
from tests.distributed.broken_ranks import BrokenEngine
from tests.unit.cli.invoking import run_cli

from flowroll.parity import run

# 144 image tokens: two ranks share them, unevenly.
SMALL = ("--size", 192, "--steps", 3, "--threads", 1, "--dtype", "float32")


def parity(folder, checkpoint, *words):
    result = run_cli("parity", checkpoint, *SMALL, *words, "--out", folder / "parity.md", "--json", folder / "parity.json")
    return result, json.loads((folder / "parity.json").read_text()), (folder / "parity.md").read_text()


@pytest.fixture(scope="module")
def broken(qwen_checkpoint, tmp_path_factory):
    """A run in which every layout has a fault of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Engine", BrokenEngine)
        return parity(tmp_path_factory.mktemp("broken"), qwen_checkpoint, "--modes", "sde", "--device", "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)])
def test_a_healthy_layout_is_exact_and_the_status_is_0(device, z_image_checkpoint, tmp_path):
    words = ("--layouts", "sp2", "--modes", "sde,ode", "--num-outputs", 2, "--guidance-scale", 2, "--device", device)
    result, report, markdown = parity(tmp_path, z_image_checkpoint, *words)
    assert result.exit_code == 0, result.output
    assert report["is_exact"] is True
    [sp2] = report["layouts"]
    assert {tensor["mode"] for tensor in sp2["tensors"]} == {"sde", "ode"}
    assert all(tensor["whole"]["equal"] for tensor in sp2["tensors"])
    assert sp2["received_bytes"]["sp"] > 0  # rows were really shared out
    assert "**Exact: 1 of 1 layouts** (sp2)" in markdown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "layout", "origin", "untouched"),
    [
        ("keys permuted", "sp2", "debug_tensors.model_output", "debug_tensors.variance_noise"),
        ("noise drawn per shard", "tp2", "debug_tensors.variance_noise", "debug_tensors.noise_std_dev"),
        ("std in bfloat16", "cfg2", "dit_trajectory.latents", "debug_tensors.noise_std_dev"),
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
    differing = {tensor["name"] for tensor in found["tensors"] if not tensor["whole"]["equal"]}
    assert {origin, "dit_trajectory.latents", "image"} <= differing
    assert untouched not in differing
    assert f"**Not exact: {layout}.** {len(differing)} of " in markdown
