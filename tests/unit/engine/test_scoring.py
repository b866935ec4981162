"""Scoring a recorded step on the engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine, guided

from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError, ShuttingDownError
from flowroll.families import FAMILIES

REQUEST = {"prompt": "a bowl", "height": 64, "width": 64, "num_inference_steps": 3, "seed": 5}


@pytest.fixture(scope="module", params=list(FAMILIES))
def engine(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    with PicturedEngine(checkpoints[request.param], dtype="bfloat16") as engine:
        yield engine


def recorded(engine: Engine, **options: Any) -> Any:
    options = {"return_denoising_env": True, "return_dit_trajectory": True, "debug_mode": True, **options}
    return engine.rollout(**guided(engine.info.family, options.pop("guidance_scale", 4.0), **REQUEST, **options))[0]


def arguments(rollout: Any, step: int) -> dict[str, Any]:
    latents = rollout.dit_trajectory.latents
    return {
        "latents": latents[step],
        "next_latents": latents[step + 1],
        "step": step,
        "env": rollout.denoising_env,
        "record": rollout.sampling,
        "sde_step_indices": rollout.sde_step_indices,
    }


@pytest.mark.parametrize("options", [{}, {"sde_type": "cps"}, {"sde_step_indices": (1,)}, {"guidance_scale": 0.0}])
def test_a_score_has_the_bits_of_the_rollout(engine: Engine, options: dict[str, Any]) -> None:
    rollout = recorded(engine, **options)
    for step in range(3):
        score = engine.score(**arguments(rollout, step))
        assert torch.equal(score.log_prob, rollout.log_probs[step])
        assert torch.equal(score.mean, rollout.debug_tensors.prev_sample_mean[step])
        assert torch.equal(score.velocity, rollout.debug_tensors.model_output[step])
        assert score.std == rollout.debug_tensors.noise_std_dev[step].item()
        assert not score.log_prob.requires_grad


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("steps", {"step": 3}, "lie in 0..2, got 3"),
        ("steps", {"step": -1}, "lie in 0..2, got -1"),
        ("latents", {"latents": torch.ones(2, 3)}, r"at 64 x 64, got \[2, 3\]; send one state"),
        ("sampling.family", {"family": "sdxl"}, "which this engine has, got sdxl"),
        ("sampling.model_dtype", {"model_dtype": "torch.float32"}, "which this engine has, got torch.float32"),
        ("denoising_env", {"neg_cond_kwargs": None}, "hold neg_cond_kwargs for a guided rollout"),
    ],
)
def test_what_does_not_fit_is_refused(engine: Engine, field: str, values: dict[str, Any], words: str) -> None:
    rollout = recorded(engine)
    given = arguments(rollout, 0)
    for key, value in values.items():
        if key in ("family", "model_dtype"):
            given["record"] = replace(rollout.sampling, **{key: value})
        elif key == "neg_cond_kwargs":
            given["env"] = replace(rollout.denoising_env, neg_cond_kwargs=None)
        else:
            given[key] = value
            if key == "latents":
                # Two different shapes are refused by the annotations, which tests execute.
                given["next_latents"] = value
    with pytest.raises(InvalidRequestError, match=words) as caught:
        engine.score(**given)
    assert caught.value.field == field


def test_a_closed_engine_scores_nothing(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint) as engine:
        rollout = recorded(engine)
    with pytest.raises(ShuttingDownError):
        engine.score(**arguments(rollout, 0))
