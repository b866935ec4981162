"""Every form of the log-prob: what the recorded tensors give in it, and what replay and scores give again, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pairs import dealt

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.replay.remote import score_params
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.sampling.transition import LogProbForm

EngineOf = Callable[[str, str], Engine]
REQUEST: dict[str, Any] = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "seed": 3,
    "noise_level": 0.6,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "debug_mode": True,
}
FORMS = (
    LogProbForm(reduce="sum"),
    LogProbForm(constants=False),
    LogProbForm(inverse_variance=False),
    LogProbForm(reduce="sum", constants=False, inverse_variance=False),
)
STOCHASTIC = tuple(name for name, found in DYNAMICS.items() if found.is_stochastic)


def density(rollout: Rollout, step: int) -> torch.Tensor:
    """The log-density of every element of a step's next latents, in float64, from what the rollout says of the step."""
    assert rollout.debug_tensors is not None and rollout.dit_trajectory is not None
    mean, std = rollout.debug_tensors.prev_sample_mean[step].double(), rollout.debug_tensors.noise_std_dev[step].double()
    return torch.distributions.Normal(mean, std).log_prob(rollout.dit_trajectory.latents[step + 1].double())


@dealt(name=tuple(FAMILIES), dtype=("bfloat16", "float32"), dynamics=STOCHASTIC, form=FORMS)
def test_replay_and_scores_follow_the_form_of_the_record(
    engine_of: EngineOf, pipeline_of: Callable[[str, str], Any], name: str, dtype: str, dynamics: str, form: LogProbForm
) -> None:
    engine = engine_of(name, dtype)
    (usual,) = engine.rollout(**REQUEST, sde_type=dynamics)
    (rollout,) = engine.rollout(**REQUEST, sde_type=dynamics, log_prob=form)
    assert rollout.sampling.log_prob == form and usual.sampling.log_prob is None
    assert rollout.log_probs is not None and usual.log_probs is not None and rollout.dit_trajectory is not None
    assert not torch.equal(rollout.log_probs, usual.log_probs)
    again = replay.log_prob(pipeline_of(name, dtype).transformer, [rollout]).cpu()
    assert torch.equal(replay.ratio(again, rollout.log_probs[None]), torch.ones_like(again))
    answer = engine.run_scores(score_params([rollout], None, log_probs_only=True))
    assert torch.equal(answer.samples[0].log_probs, rollout.log_probs)
    for step in rollout.sde_step_indices or ():
        std = rollout.debug_tensors.noise_std_dev[step].double()  # type: ignore[union-attr]
        constants = -std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        values = density(rollout, step) - constants
        values = values if form.inverse_variance else values * 2 * std**2
        values = values + constants if form.constants else values
        expected = values.sum() if form.reduce == "sum" else values.mean()
        torch.testing.assert_close(rollout.log_probs[step].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_form_without_scale_and_constants_has_two_names(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    (one,) = engine.rollout(**REQUEST, log_prob={"constants": False, "inverse_variance": False})
    (other,) = engine.rollout(**REQUEST, log_prob_no_const=True)
    assert one.log_probs is not None and other.log_probs is not None and torch.equal(one.log_probs, other.log_probs)
    with pytest.raises(InvalidRequestError, match="log_prob must be given without rollout_log_prob_no_const, got 'both'"):
        engine.rollout(**REQUEST, log_prob={}, log_prob_no_const=True)
    with pytest.raises(InvalidRequestError, match="log_prob must hold reduce, constants, inverse_variance alone, got 'scale'"):
        engine.rollout(**REQUEST, log_prob={"scale": True})
