"""Recorded steps scored again by several ranks."""

from pathlib import Path
from typing import Any

import torch
from tests.guiding import PicturedEngine, guided
from tests.pairs import dealt
from tests.rollouts import assert_same_bits

from flowroll.families import FAMILIES
from flowroll.replay.remote import score_params
from flowroll.types import Layout

# 144 image tokens: two ranks share them.
REQUEST: dict[str, Any] = {"prompt": "a cat", "seed": 3, "height": 192, "width": 192, "num_inference_steps": 2}


@dealt(family=tuple(FAMILIES), layout=(Layout(sp=2), Layout(tp=2), Layout(cfg_parallel=True)))
def test_recorded_steps_are_scored_on_every_layout_with_the_bits_that_were_recorded(
    checkpoints: dict[str, Path], family: str, layout: Layout
) -> None:
    request = guided(family, 3.0, **REQUEST, return_denoising_env=True, return_dit_trajectory=True, debug_mode=True)
    with PicturedEngine(checkpoints[family], device="cpu", layout=layout, rank_timeout_s=60.0) as engine:
        rollouts = engine.rollout(**request, sde_step_indices=(1,), num_outputs_per_prompt=2)
        keys = engine._peers._store.num_keys()
        answer = engine.run_scores(score_params(rollouts, None, log_probs_only=False))
        assert engine._peers._store.num_keys() <= keys + 1
        only = engine.run_scores(score_params(rollouts, None, log_probs_only=True))
        again = engine.rollout(**request, sde_step_indices=(1,))
    for rollout, scores, log_probs in zip(rollouts, answer.samples, only.samples, strict=True):
        assert rollout.debug_tensors is not None and rollout.log_probs is not None
        assert torch.equal(scores.log_probs, rollout.log_probs) and torch.equal(log_probs.log_probs, rollout.log_probs)
        assert torch.equal(scores.velocities, rollout.debug_tensors.model_output)
        assert torch.equal(scores.means, rollout.debug_tensors.prev_sample_mean)
    assert_same_bits(again[0], rollouts[0])
