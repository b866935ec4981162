"""Flow-SDE, the stochastic sampler of Flow-GRPO.

    g = n sqrt(s / (1 - s))
    mean = x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt
    std = g sqrt(-dt)

with s = sigma, t = next sigma, dt = t - s < 0, n = noise level. Where the grid starts at 1, the s in the denominator of the
first g is the second sigma of the grid, which keeps g finite. No later step may start at 1.

Reference:
    Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL" (arXiv:2505.05470), and its public code
    (yifan123/flow_grpo, `sd3_sde_with_logprob.py`), whose float32 order of operations the coefficients follow. The
    tolerance of the test s = 1 is that of torch.isclose, as in SGLang: with `s == 1`, a grid that starts at 1 - 5e-6 has
    std 62.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.base import Dynamics
from flowroll.sampling.transition import Transition


def coefficients(sigmas: Float[Tensor, " states"], step: int, noise_level: int | float) -> Transition:
    """Computes the transition of one step.

    Args:
        sigmas: The whole grid, float32.
        step: The step, counted from 0.
        noise_level: The noise level n > 0.

    Returns:
        The transition, whose coefficients are rounded to float32.
    """
    sigma = sigmas[step]
    dt = sigmas[step + 1] - sigma
    # A later step cannot use the second sigma in place of its own: the second sigma is its own or lies above it.
    below_one = sigmas[1] if step == 0 and _is_one(sigma.item()) else sigma
    g = torch.sqrt(sigma / (1 - below_one)) * noise_level
    drift = g**2 / (2 * sigma)
    return Transition(
        dynamics=DYNAMICS.name,
        on_latents=(1 + drift * dt).item(),
        on_velocity=((1 + g**2 * (1 - sigma) / (2 * sigma)) * dt).item(),
        std=(g * torch.sqrt(-dt)).item(),
    )


def _is_one(sigma: float) -> bool:
    return abs(sigma - 1) <= 1e-8 + 1e-5


def _sigma_problem(sigmas: Sequence[float], step: int) -> tuple[str, str] | None:
    if step == 0 or not _is_one(sigmas[step]):
        return None
    rule = "stay more than 1e-5 below 1 after the first value where a step of sde starts"
    return rule, f"remove it, or leave step {step} out of rollout_sde_step_indices"


DYNAMICS = Dynamics(
    name="sde",
    summary="Flow-SDE (Flow-GRPO)",
    coefficients=coefficients,
    sigma_problem=_sigma_problem,
)
