"""CPS, Coefficients-Preserving Sampling, of FlowCPS.

    std = t sin(n pi / 2)
    x0 = x - s v,  x1 = x + (1 - s) v
    mean = (1 - t) x0 + sqrt(t^2 - std^2) x1

with s = sigma, t = next sigma, n = noise level in [0, 2). The std is largest at n = 1 and falls again above it. The last step
(t = 0) has std 0: it is deterministic.

Reference:
    Wang, Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching" (arXiv:2509.05952), and its
    public code (IamCreateAI/FlowCPS).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.base import Dynamics
from flowroll.sampling.transition import NO_CONST, Transition

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def coefficients(sigmas: Float[Tensor, " states"], step: int, noise_level: int | float) -> Transition:
    """Computes the transition of one step, with the mean written as factors of latents and velocity.

    Args:
        sigmas: The whole grid, float32.
        step: The step, counted from 0.
        noise_level: The noise level n in (0, 2).

    Returns:
        The transition, whose coefficients are computed in float64 from the float32 sigmas and rounded once.
    """
    s, t = sigmas[step].item(), sigmas[step + 1].item()
    std = t * math.sin(noise_level * math.pi / 2)
    on_x1 = math.sqrt(max(t * t - std * std, 0.0))
    if std * std < _SMALLEST_NORMAL:
        # Just below n = 2: float32 cannot hold the variance that the density is divided by.
        std = 0.0
    return Transition.toward_noise(dynamics=DYNAMICS.name, sigma=s, sigma_next=t, on_x1=on_x1, std=std)


DYNAMICS = Dynamics(
    name="cps",
    summary="Coefficients-Preserving Sampling (FlowCPS)",
    coefficients=coefficients,
    noise_level_max=2.0,
    noise_level_max_is_open=True,
    log_prob_form=NO_CONST,
)
