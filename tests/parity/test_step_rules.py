"""A rule for each step: the bits of the request that says the same in another way, and of each rule by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import tensors_of

from flowroll import SamplingParams, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.sampling.dynamics import transitions
from flowroll.types import RecordedSteps, ScoreParams, StepOptions

REQUEST = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 5,
    "seed": 3,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "debug_mode": True,
}
EngineOf = Callable[[str, str], Engine]
ODE, SDE = {"dynamics": "ode"}, {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rollout_steps": (ODE, SDE, SDE, ODE, ODE)}, {"sde_step_indices": (1, 2)}),
        ({"rollout_steps": ({"noise_level": 0.4},) * 5}, {"noise_level": 0.4}),
        ({"noise_levels": (0.4,) * 5}, {"noise_level": 0.4}),
        (
            {"noise_levels": (0.2, 0.4, 0.0, 0.7, 1.0), "sde_type": "dance"},
            {"rollout_steps": tuple({"dynamics": "dance_sde", "noise_level": level} for level in (0.2, 0.4, 0.0, 0.7, 1.0))},
        ),
        ({"rollout_steps": ({"dynamics": "dpmpp2m"},) * 5}, {"sde_type": "dpmpp2m"}),
    ],
    ids=["window", "levels in steps", "levels", "levels and dynamics", "solver"],
)
def test_the_same_said_in_another_way_has_the_same_bits(engine_of: EngineOf, one: Any, other: Any) -> None:
    engine = engine_of("z_image", "bfloat16")
    left, right = (dict(tensors_of(engine.rollout(**REQUEST, **options)[0])) for options in (one, other))
    assert left.keys() == right.keys()
    for field, tensor in left.items():
        assert torch.equal(tensor, right[field]), field


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_each_step_follows_its_own_rule(engine_of: EngineOf, name: str, dtype: str) -> None:
    rules = (("sde", 0.3), ("cps", 0.9), ("dpmpp2m", 0), ("dance", 0.2), ("ddim_flow", 1.0))
    steps = tuple(StepOptions(dynamics=kind, noise_level=level) for kind, level in rules)
    (rollout,) = engine_of(name, dtype).rollout(SamplingParams(**REQUEST, rollout_steps=steps))
    assert rollout.debug_tensors is not None and rollout.dit_trajectory is not None and rollout.log_probs is not None
    for step, (kind, level) in enumerate(rules):
        alike = transitions(rollout.dit_trajectory.sigmas, sde_type=kind, noise_level=level)[step]
        assert rollout.debug_tensors.noise_std_dev[step].item() == alike.std
    assert rollout.sde_step_indices == (0, 1, 3)
    assert [(rule.dynamics, rule.noise_level) for rule in rollout.sampling.steps or ()] == list(rules)


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_the_engine_scores_steps_that_need_the_step_before(engine_of: EngineOf, name: str, dtype: str) -> None:
    engine = engine_of(name, dtype)
    (rollout,) = engine.rollout(**REQUEST, sde_type="dpmpp2m")
    assert rollout.debug_tensors is not None and rollout.dit_trajectory is not None and rollout.denoising_env is not None

    def sample(*steps: int) -> RecordedSteps:
        states = rollout.dit_trajectory.latents
        return RecordedSteps(
            steps=steps,
            latents=states[list(steps)],
            next_latents=states[[step + 1 for step in steps]],
            denoising_env=rollout.denoising_env,
            sampling=rollout.sampling,
            sde_step_indices=rollout.sde_step_indices,
        )

    answer = engine.run_scores(ScoreParams(samples=(sample(3, 1, 2),)))
    assert answer.samples[0].means is not None
    assert torch.equal(answer.samples[0].means, rollout.debug_tensors.prev_sample_mean[[3, 1, 2]])
    with pytest.raises(InvalidRequestError, match=r"steps must hold 2 beside 3, .* got \[3\]; send both steps"):
        engine.run_scores(ScoreParams(samples=(sample(3),)))
    assert engine.run_scores(ScoreParams(samples=(sample(3),), log_probs_only=True)).samples[0].log_probs.tolist() == [0.0]


def test_a_trajectory_without_the_state_before_cannot_replay_such_a_step(
    engine_of: EngineOf, pipeline_of: Callable[[str, str], Any]
) -> None:
    group = engine_of("z_image", "float32").rollout(**REQUEST, sde_type="dpmpp2m", return_step_indices=(3, 4))
    transformer = pipeline_of("z_image", "float32").transformer
    with pytest.raises(InvalidRequestError, match="hold the states 2 and 3 and 4 to replay step 3"):
        replay.score(transformer, group, steps=[3])
    whole = engine_of("z_image", "float32").rollout(**REQUEST, sde_type="dpmpp2m", return_step_indices=(2, 3, 4))
    assert whole[0].debug_tensors is not None
    mean = replay.score(transformer, whole, steps=[3]).means[0][0]
    assert torch.equal(mean.detach(), whole[0].debug_tensors.prev_sample_mean[3])


def test_the_mean_of_a_step_has_a_gradient_through_the_step_before(
    engine_of: EngineOf, pipeline_of: Callable[[str, str], Any]
) -> None:
    """As the step's own formula has it: next = on_latents x + on_velocity v + on_previous (x_prev - sigma_prev v_prev)."""
    (rollout,) = engine_of("z_image", "float32").rollout(**REQUEST, sde_type="dpmpp2m")
    transformer = pipeline_of("z_image", "float32").transformer
    weight = next(parameter for parameter in transformer.parameters() if parameter.ndim == 2)
    assert rollout.dit_trajectory is not None
    this = transitions(rollout.dit_trajectory.sigmas, sde_type="dpmpp2m", noise_level=0)[3]
    assert this.needs_previous
    scores = replay.score(transformer, [rollout], steps=[2, 3])
    (found,) = torch.autograd.grad(scores.means[0][1].sum(), weight, retain_graph=True)
    before, own = (torch.autograd.grad(velocity.sum(), weight, retain_graph=True)[0] for velocity in scores.velocities[0])
    expected = this.on_velocity * own - this.on_previous * rollout.sampling.sigmas[2] * before
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - this.on_velocity * own).norm() > 0.1 * expected.norm()
