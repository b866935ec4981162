"""The Euler step of the probability-flow ODE, in the dtypes of diffusers' `FlowMatchEulerDiscreteScheduler.step`.

    next = x + dt v

The product dt v is rounded to the velocity's dtype, the sum is taken in float32 and rounded to the velocity's dtype: with a
bf16 velocity that is not the same as one rounding at the end.

Reference:
    Lipman et al., "Flow Matching for Generative Modeling" (arXiv:2210.02747); diffusers 0.42.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.base import Dynamics
from flowroll.sampling.transition import ODE, Transition


def step(
    latents: Float[Tensor, " *latent"], velocity: Float[Tensor, " *latent"], dt: Float[Tensor, ""]
) -> Float[Tensor, " *latent"]:
    """Takes one deterministic step.

    Args:
        latents: x at sigma, any float dtype.
        velocity: v, any float dtype.
        dt: Next sigma minus sigma, a float32 scalar on the latents' device. (On an accelerator a Python number would be
            multiplied in another precision than the scheduler's tensor is.)

    Returns:
        The next latents, in the velocity's dtype.
    """
    return (latents.to(torch.float32) + dt * velocity).to(velocity.dtype)


def coefficients(sigmas: Float[Tensor, " states"], step: int, noise_level: int | float) -> Transition:
    """Computes the transition of one step for its record; `step` is what takes the step."""
    dt = sigmas[step + 1] - sigmas[step]
    return Transition(dynamics=ODE, on_latents=1.0, on_velocity=dt.item(), std=0.0)


DYNAMICS = Dynamics(
    name=ODE, summary="Euler steps, as the plain pipeline takes them", coefficients=coefficients, is_stochastic=False
)
