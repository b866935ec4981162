"""The whole loop over HTTP: a policy learns from its rewards, and learns nothing from a spoilt trajectory."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import flowroll.examples.branch_grpo as branch_grpo
import flowroll.examples.diffusion_nft as diffusion_nft
import flowroll.examples.flow_grpo as flow_grpo
from flowroll.engine import Engine
from flowroll.examples.rl.figures import EXAMPLES
from flowroll.examples.rl.journal import Row, read_rows
from flowroll.examples.rl.spoiling import MISTAKES, SPOIL_ROLLOUTS


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


@pytest.mark.proof
@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (flow_grpo.main, ("--window", "2", "--move-every", "1")),
        (flow_grpo.main, ("--window", "2", "--lora-rank", "4")),
        (diffusion_nft.main, ("--decay", "0.5", "--noise-levels", "1")),
        (branch_grpo.main, ("--fork", "0:2", "3:2")),
    ],
    ids=["mix", "adapter", "nft", "branch"],
)
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_never_cut_off(tmp_path, main, flags):
    """Weights, optimizer, random numbers, versions, and the old policy on the server."""
    common = ("--prompts", "2", "--group-size", "3", *flags)
    whole = run(main, tmp_path / "whole", *common, "--rounds", "3", "--save", str(tmp_path / "whole-saved"))
    run(main, tmp_path / "first", *common, "--rounds", "1", "--save", str(tmp_path / "saved"))
    again = ("--rounds", "3", "--resume", str(tmp_path / "saved"), "--save", str(tmp_path / "saved-again"))
    rest = run(main, tmp_path / "rest", *common, *again)
    states = [torch.load(tmp_path / name / "training_state.pt", weights_only=True) for name in ("whole-saved", "saved-again")]
    assert states[0]["rounds"] == states[1]["rounds"] == 3
    for name, tensor in states[0]["policy"].items():
        assert torch.equal(tensor, states[1]["policy"][name])
    assert [(row.round, row.reward, row.ratio_error) for row in rest] == [
        (row.round, row.reward, row.ratio_error) for row in whole
    ]
    assert rest[-1].evaluation == whole[-1].evaluation
    # What was saved can be served.
    with Engine(tmp_path / "saved-again", device="cpu") as engine:
        assert engine.rollout("a red circle", num_inference_steps=2, seed=1)
    with pytest.raises(SystemExit, match="--seed must be 0 to go on"):
        main(["--out", str(tmp_path / "other"), "--resume", str(tmp_path / "saved"), "--seed", "1", *common])


ROUNDS = ("--window", "2", "--rounds", "8")


@pytest.mark.proof
def test_rewards_teach(tmp_path):
    rows = run(flow_grpo.main, tmp_path, *ROUNDS)
    assert rows[-1].evaluation > rows[0].evaluation + 0.08


@pytest.mark.proof
@pytest.mark.parametrize(
    ("name", "rounds"), [("mix", 10), ("dance", 6), ("branch", 8), ("nft-ema", 15)], ids=["mix", "dance", "branch", "nft-ema"]
)
def test_every_algorithm_learns(tmp_path, name, rounds):
    """With the flags of the documentation's curves, in fewer rounds."""
    module, *flags = next(example.command for example in EXAMPLES if example.name == name)
    rows = run(importlib.import_module(module).main, tmp_path, *flags, "--rounds", str(rounds))
    assert rows[-1].evaluation > rows[0].evaluation + 0.05


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
