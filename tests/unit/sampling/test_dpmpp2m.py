"""DPM-Solver++(2M): the update functions of diffusers, and the order of convergence on a Gaussian target."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tests.unit.sampling.test_marginals import exact_velocity, marginal

from flowroll.sampling import dpmpp2m, transition
from flowroll.sampling.dynamics import transitions

GRIDS = {
    "from noise": [1.0, 0.93, 0.8, 0.55, 0.3, 0.0],
    "from below noise": [0.97, 0.9, 0.72, 0.5, 0.21, 0.05, 0.0],
    "two steps": [1.0, 0.4, 0.0],
    "one step": [1.0, 0.0],
}


def scheduler_at(sigmas: torch.Tensor, step: int) -> DPMSolverMultistepScheduler:
    """diffusers' scheduler on a grid of its own, in float64; its `set_timesteps` takes no sigmas, and its `step` casts."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.sigmas, scheduler._step_index = sigmas, step
    return scheduler


@pytest.mark.parametrize("name", GRIDS)
def test_every_step_is_diffusers_update_in_float64(name: str) -> None:
    sigmas = torch.tensor(GRIDS[name], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, generator=generator, dtype=torch.float64)
    clean: list[torch.Tensor] = []
    for step in range(len(sigmas) - 1):
        velocity = torch.randn(64, generator=generator, dtype=torch.float64)
        clean.append(latents - sigmas[step] * velocity)
        scheduler = scheduler_at(sigmas, step)
        # diffusers' own rule for a grid that ends at 0: the first step and the last one are of first order.
        if step in (0, len(sigmas) - 2):
            expected = scheduler.dpm_solver_first_order_update(clean[-1], sample=latents)
        else:
            expected = scheduler.multistep_dpm_solver_second_order_update(clean[-2:], sample=latents)
        on_latents, on_velocity, on_previous = dpmpp2m.factors(GRIDS[name], step)
        found = on_latents * latents + on_velocity * velocity
        if on_previous:
            found = found + on_previous * clean[-2]
        assert (found - expected).abs().max() < 1e-12
        latents = expected


def test_the_second_step_from_pure_noise_and_the_ends_are_of_first_order() -> None:
    orders = [
        this.needs_previous for this in transitions(torch.tensor(GRIDS["from noise"]), sde_type="dpmpp2m", noise_level=0.7)
    ]
    assert orders == [False, False, True, True, False]
    orders = [
        this.needs_previous for this in transitions(torch.tensor([0.97, 0.9, 0.5, 0.0]), sde_type="dpmpp2m", noise_level=0)
    ]
    assert orders == [False, True, False]


def error(sde_type: str, steps: int, *, start: float = 0.9, end: float = 0.1) -> float:
    """The error of one trajectory of the exact velocity field, from `start` to `end`, with float64 latents."""
    sigmas = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    (mean, var), (end_mean, end_var) = marginal(start), marginal(end)
    latents = torch.tensor([mean + math.sqrt(var)], dtype=torch.float64)
    previous: torch.Tensor | None = None
    for step in range(steps):
        slope, offset = exact_velocity(sigmas[step].item())
        velocity = slope * latents + offset
        clean = latents - sigmas[step] * velocity
        if sde_type == "ode":
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        else:
            on_latents, on_velocity, on_previous = dpmpp2m.factors(sigmas.tolist(), step)
            latents = on_latents * latents + on_velocity * velocity
            if previous is not None and step:
                latents = latents + on_previous * previous
        previous = clean
    return abs(latents.item() - (end_mean + math.sqrt(end_var)))


def test_it_converges_at_second_order_where_euler_converges_at_first() -> None:
    assert 1.9 < math.log2(error("dpmpp2m", 640) / error("dpmpp2m", 1280)) < 2.1
    assert 0.9 < math.log2(error("ode", 640) / error("ode", 1280)) < 1.1
    assert error("dpmpp2m", 20) < error("ode", 20) / 3


def test_a_mean_without_the_step_before_is_an_error() -> None:
    this = transitions(torch.tensor(GRIDS["from noise"]), sde_type="dpmpp2m", noise_level=0.7)[2]
    with pytest.raises(AssertionError):
        transition.mean(this, torch.zeros(4), torch.zeros(4))
