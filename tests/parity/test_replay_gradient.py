"""The gradient of a replayed log-prob, against finite differences of an independent evaluation in float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.guiding import guided
from torch import nn

from flowroll import DenoisingEnv, Rollout, replay
from flowroll.engine import Engine
from flowroll.families import FAMILIES, StepInput
from flowroll.sampling.dynamics import DYNAMICS, transitions

REQUEST = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}


def in_float64(env: DenoisingEnv) -> DenoisingEnv:
    def branch(values: Any) -> dict[str, Any]:
        return {
            key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in values.items()
        }

    negative = env.neg_cond_kwargs
    return DenoisingEnv(
        image_kwargs=branch(env.image_kwargs),
        pos_cond_kwargs=branch(env.pos_cond_kwargs),
        neg_cond_kwargs=None if negative is None else branch(negative),
        guidance=env.guidance,
    )


def log_prob_in_float64(transformer: nn.Module, rollout: Rollout, step: int) -> float:
    """The density's definition, element by element; the model's own casts to float32 remain."""
    record, trajectory, env = rollout.sampling, rollout.dit_trajectory, rollout.denoising_env
    assert trajectory is not None and env is not None
    family = FAMILIES[record.family]
    this = transitions(trajectory.sigmas, sde_type=record.sde_type, noise_level=record.noise_level)[step]
    timestep = family.model_timesteps(trajectory.timesteps, torch.float64)[step : step + 1]
    x, following = trajectory.latents[step].double(), trajectory.latents[step + 1].double()
    guidance = family.guidance(record.guidance_scale)
    with torch.no_grad():
        one = StepInput(latents=x, timestep=timestep, env=in_float64(env), guidance=guidance, is_first=step == 0)
        v = family.velocity(transformer, one, torch.float64).double()
    density = torch.distributions.Normal(this.on_latents * x + this.on_velocity * v, this.std)
    return float(density.log_prob(following).mean())


@pytest.mark.parametrize("sde_type", [name for name, found in DYNAMICS.items() if found.is_stochastic])
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_agree_with_finite_differences(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, cfg: bool, sde_type: str
) -> None:
    if engine_of(name, "float32").info.device != "cpu":
        pytest.skip("one device is enough")
    rollout = engine_of(name, "float32").rollout(**guided(name, 3.0 if cfg else 0.0, **REQUEST, sde_type=sde_type))[0]
    transformer = copy.deepcopy(pipeline_of(name, "float32").transformer)
    step = 1
    log_prob = replay.log_prob(transformer, [rollout], steps=[step])[0, 0]
    exact = copy.deepcopy(transformer)
    exact.to(torch.float64)
    assert log_prob.item() == pytest.approx(log_prob_in_float64(exact, rollout, step), abs=1e-5)
    log_prob.backward()

    generator = torch.Generator().manual_seed(1)
    direction = {
        key: torch.randn(weight.shape, generator=generator, dtype=torch.float64) * weight.std().item()
        for key, weight in transformer.named_parameters()
        if weight.grad is not None and weight.numel() > 1
    }
    gradients = dict(transformer.named_parameters())
    terms = torch.cat([(gradients[key].grad.double() * along).flatten() for key, along in direction.items()])
    slope, magnitude = float(terms.sum()), float(terms.abs().sum())

    def moved(by: float) -> float:
        nudged = copy.deepcopy(exact)
        with torch.no_grad():
            for key, weight in nudged.named_parameters():
                if key in direction:
                    weight += by * direction[key]
        return log_prob_in_float64(nudged, rollout, step)

    reach = 1e-4
    difference = (moved(reach) - moved(-reach)) / (2 * reach)
    assert math.isfinite(slope) and abs(slope) > 5e-4
    # The terms of a small std are large and cancel: neither side can be more exact than their rounding, up to 1.3e-6 of their
    # magnitudes on CPUs with and without AVX-512.
    assert slope == pytest.approx(difference, rel=2e-3, abs=2e-6 * magnitude)
