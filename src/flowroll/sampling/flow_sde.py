"""Flow-SDE, the stochastic sampler of Flow-GRPO.

    g = n sqrt(s / (1 - s))
    mean = x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt
    std = g sqrt(-dt)

with s = sigma, t = next sigma, dt = t - s < 0, n = noise level. Where s is 1 the s in the denominator of g is the second sigma
of the grid, which keeps g finite.

Reference:
    Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL" (arXiv:2505.05470), and its public code
    (yifan123/flow_grpo, `sd3_sde_with_logprob.py`), whose float32 order of operations the coefficients follow. The
    tolerance of the test s = 1 is that of torch.isclose, as in SGLang: with `s == 1`, a grid that starts at 1 - 5e-6 has
    std 62.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.transition import Transition


def transition(
    sigma: Float[Tensor, ""], sigma_next: Float[Tensor, ""], second_sigma: Float[Tensor, ""], noise_level: int | float
) -> Transition:
    """The transition of one step.

    Args:
        sigma: s, float32.
        sigma_next: t < s, float32.
        second_sigma: The second sigma of the grid, float32.
        noise_level: n > 0.

    Returns:
        Its coefficients, rounded to float32.
    """
    dt = sigma_next - sigma
    at_one = torch.isclose(sigma, torch.ones_like(sigma))
    g = torch.sqrt(sigma / (1 - torch.where(at_one, second_sigma, sigma))) * noise_level
    drift = g**2 / (2 * sigma)
    return Transition(
        dynamics="sde",
        on_latents=(1 + drift * dt).item(),
        on_velocity=((1 + g**2 * (1 - sigma) / (2 * sigma)) * dt).item(),
        std=(g * torch.sqrt(-dt)).item(),
    )
