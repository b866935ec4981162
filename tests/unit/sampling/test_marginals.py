"""With the exact velocity of a Gaussian target, every sampler keeps the flow's marginals.

The target is N(m, c^2) in one dimension. On the path x_s = (1 - s) x0 + s eps the marginal is N((1 - s) m, (1 - s)^2 c^2 + s^2)
and the exact velocity E[eps - x0 | x_s] is affine in x. A transition is affine too, so the sampler's own marginals follow by
arithmetic on two numbers, with no sampling error: what remains is the discretisation error, which has to vanish as its
order says.
"""

import pytest
import torch

from flowroll.sampling import ode, transition
from flowroll.sampling.dynamics import transitions

M, C = 0.8, 0.5


def marginal(sigma: float, m: float = M, c: float = C) -> tuple[float, float]:
    return (1 - sigma) * m, (1 - sigma) ** 2 * c**2 + sigma**2


def exact_velocity(sigma: float, m: float = M, c: float = C) -> tuple[float, float]:
    """Slope and offset of v(x) = slope x + offset."""
    mean, var = marginal(sigma, m, c)
    slope = (sigma - (1 - sigma) * c**2) / var
    return slope, -slope * mean - m


def final_error(sde_type: str, steps: int, noise_level: float, *, start: float = 0.9, end: float = 0.1, c: float = C) -> float:
    """Largest error of mean and variance after going from `start` to `end` in `steps` steps."""
    sigmas = torch.linspace(start, end, steps + 1, dtype=torch.float64).to(torch.float32)
    mean, var = marginal(start, c=c)
    for step, this in enumerate(transitions(sigmas, sde_type=sde_type, noise_level=noise_level)):
        slope, offset = exact_velocity(sigmas[step].item(), c=c)
        factor = this.on_latents + this.on_velocity * slope
        mean, var = factor * mean + this.on_velocity * offset, factor**2 * var + this.std**2
    exact_mean, exact_var = marginal(end, c=c)
    return max(abs(mean - exact_mean), abs(var - exact_var))


@pytest.mark.parametrize(
    ("sde_type", "noise_level"),
    [("sde", 0.3), ("sde", 0.7), ("sde", 1.5), ("dance", 0.3), ("dance", 1.5), ("ddim_flow", 0.3), ("ddim_flow", 1.0)],
)
def test_an_sde_converges_to_the_marginals_at_first_order(sde_type: str, noise_level: float) -> None:
    coarse, fine = final_error(sde_type, 400, noise_level), final_error(sde_type, 800, noise_level)
    assert fine < 0.02
    assert 1.8 < coarse / fine < 2.2


def test_ode_converges_to_the_marginals_at_first_order() -> None:
    coarse, fine = final_error("ode", 400, 0.7), final_error("ode", 800, 0.7)
    assert fine < 0.005
    assert 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize("noise_level", [0.2, 0.8, 1.0, 1.3, 1.99])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_cps_keeps_the_marginals_of_a_single_image_exactly(noise_level: float, steps: int) -> None:
    # With one image as the target the predicted noise is the noise itself, and the coefficients alone make the marginal.
    assert final_error("cps", steps, noise_level, c=1e-6) < 1e-5


def test_cps_converges_to_the_marginals_at_first_order_in_its_noise_per_step() -> None:
    # Its std does not shrink with the step, so for a target with a spread the noise has to: n^2 proportional to the step.
    coarse, fine = final_error("cps", 400, 0.5 / 20), final_error("cps", 800, 0.5 / 800**0.5)
    assert fine < 0.005
    assert 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize(("sde_type", "noise_level"), [("sde", 0.7), ("cps", 0.1), ("dance", 0.7), ("ddim_flow", 1.0)])
def test_samples_themselves_have_the_marginals(sde_type: str, noise_level: float) -> None:
    sigmas = torch.linspace(0.9, 0.1, 101)
    generator = torch.Generator().manual_seed(1)
    mean, var = marginal(0.9)
    latents = mean + var**0.5 * torch.randn(1, 100_000, generator=generator)
    for step, this in enumerate(transitions(sigmas, sde_type=sde_type, noise_level=noise_level)):
        slope, offset = exact_velocity(sigmas[step].item())
        step_mean = transition.mean(this, latents, slope * latents + offset)
        latents = transition.sample(this, step_mean, torch.randn(1, 100_000, generator=generator))
    mean, var = marginal(0.1)
    assert abs(latents.mean().item() - mean) < 0.02
    assert abs(latents.var().item() / var - 1) < 0.06


def test_ode_samples_themselves_have_the_marginals() -> None:
    sigmas = torch.linspace(0.9, 0.1, 101)
    mean, var = marginal(0.9)
    latents = mean + var**0.5 * torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    for step in range(100):
        slope, offset = exact_velocity(sigmas[step].item())
        latents = ode.step(latents, slope * latents + offset, sigmas[step + 1] - sigmas[step])
    mean, var = marginal(0.1)
    assert abs(latents.mean().item() - mean) < 0.02
    assert abs(latents.var().item() / var - 1) < 0.06


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_ddim_keeps_the_marginals_of_a_single_image_exactly(steps: int) -> None:
    assert final_error("ddim_flow", steps, 1.0, c=1e-6) < 1e-5


def test_flow_sde_from_pure_noise_ends_at_the_target() -> None:
    # The first steps of a grid that starts at 1 are large in g whatever their number, so this converges, but slowly.
    errors = [final_error("sde", steps, 0.7, start=1.0, end=0.0) for steps in (50, 200, 800)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_dance_from_pure_noise_ends_at_the_target_at_first_order() -> None:
    # Unlike Flow-SDE it is finite at sigma = 1, so the first steps are no worse than the others.
    coarse, fine = (final_error("dance", steps, 0.7, start=1.0, end=0.0) for steps in (400, 800))
    assert fine < 0.02
    assert 1.8 < coarse / fine < 2.2
