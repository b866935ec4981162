"""The whole loop over HTTP: a policy learns from its rewards, and learns nothing from a spoilt trajectory."""

import re
from pathlib import Path

import examples.diffusion_nft as diffusion_nft
import examples.flow_grpo as flow_grpo
import pytest
from examples.rl.journal import Row, read_rows
from examples.rl.spoiling import MISTAKES, SPOIL_ROLLOUTS
from PIL import Image


def run(main, out: Path, *flags: str) -> list[Row]:
    out.mkdir(exist_ok=True)
    main(["--out", str(out), "--evaluate-every", "100", *flags])
    return read_rows(out / "rewards.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "route", "count"),
    [
        ((), r"/weights/\w+/commit", 2),
        pytest.param(("--lora-rank", "4"), "/load_lora_adapter_from_tensors", 3, marks=pytest.mark.proof),
    ],
    ids=["all weights", "adapter"],
)
def test_every_round_starts_at_a_ratio_of_one_with_the_weights_of_the_round_before(tmp_path, flags, route, count):
    rows = run(flow_grpo.main, tmp_path, "--window", "2", "--rounds", "2", "--prompts", "2", "--group-size", "3", *flags)
    assert [row.ratio_error for row in rows] == [0.0, 0.0, None]
    # The server draws otherwise now: it has the new weights.
    assert rows[0].evaluation != rows[-1].evaluation
    log = (tmp_path / "server.log").read_text()
    assert len(re.findall(f"path={route} status=200", log)) == count
    for picture in ("rewards.png", "pictures.png"):
        assert min(Image.open(tmp_path / picture).size) > 200


ROUNDS = ("--window", "2", "--rounds", "8")


@pytest.mark.proof
def test_rewards_teach(tmp_path):
    rows = run(flow_grpo.main, tmp_path, *ROUNDS)
    assert rows[-1].evaluation > rows[0].evaluation + 0.08


@pytest.mark.proof
def test_clean_latents_alone_teach_too(tmp_path):
    rows = run(diffusion_nft.main, tmp_path, "--rounds", "15")
    assert rows[-1].evaluation > rows[0].evaluation + 0.08


@pytest.mark.proof
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_teaches_nothing(tmp_path, mistake):
    rows = run(flow_grpo.main, tmp_path, *ROUNDS, "--mistake", mistake)
    assert rows[-1].evaluation < rows[0].evaluation + 0.03
    # What is wrong with the rollouts shows in the ratio; wrong rewards do not.
    assert (rows[0].ratio_error > 0) == (mistake in SPOIL_ROLLOUTS)
