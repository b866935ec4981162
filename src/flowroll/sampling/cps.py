"""CPS, Coefficients-Preserving Sampling, of FlowCPS.

    std = t sin(n pi / 2)
    x0 = x - s v,  x1 = x + (1 - s) v
    mean = (1 - t) x0 + sqrt(t^2 - std^2) x1

with s = sigma, t = next sigma, n = noise level in [0, 1]. The last step (t = 0) has std 0: it is deterministic.

Reference:
    Wang, Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching" (arXiv:2509.05952), and its
    public code (IamCreateAI/FlowCPS).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.transition import Transition


def transition(sigma: Float[Tensor, ""], sigma_next: Float[Tensor, ""], noise_level: int | float) -> Transition:
    """The transition of one step, with the mean collected by latents and velocity.

    Args:
        sigma: s, float32.
        sigma_next: t < s, float32.
        noise_level: n in (0, 1].

    Returns:
        Its coefficients, computed in float64 from the float32 sigmas and rounded once.
    """
    s, t = sigma.item(), sigma_next.item()
    std = t * math.sin(noise_level * math.pi / 2)
    on_x1 = math.sqrt(max(t * t - std * std, 0.0))
    exact = torch.tensor([(1 - t) + on_x1, on_x1 * (1 - s) - (1 - t) * s, std], dtype=torch.float64)
    on_latents, on_velocity, rounded_std = exact.to(torch.float32).tolist()
    return Transition(dynamics="cps", on_latents=on_latents, on_velocity=on_velocity, std=rounded_std)
