"""The example that scouts: which noise its second runs have, and that going on is the run that was never interrupted."""

import torch

import flowroll.examples.scout as scout
from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.engine import Engine


def test_what_is_chosen_runs_again_from_the_same_noise(capsys) -> None:
    found = scout.main(["--scouts", "4", "--keep", "2", "--seed", "3"])
    assert set(found) == {"few steps", "stop early"} and "few steps: scouts" in capsys.readouterr().out
    with Engine(shapes_checkpoint(SHAPES_FAMILIES[0])) as engine:
        for name, one in found.items():
            assert len(one.scouted) == 4 and len(one.rollouts) == 2 and set(one.chosen) <= {3, 4, 5, 6}
            assert one.steps == {"few steps": 4 * 3 + 2 * 8, "stop early": 4 * 3 + 2 * 5}[name]
            prompt = one.rollouts[0].prompt
            whole = engine.rollout(prompt, seeds=one.chosen, num_inference_steps=8)
            for rollout, uninterrupted in zip(one.rollouts, whole, strict=True):
                assert torch.equal(rollout.image, uninterrupted.image)
                assert rollout.sampling.sde_seed == uninterrupted.seed
