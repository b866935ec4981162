"""Dance-SDE, the stochastic sampler of DanceGRPO: Flow-SDE with g = n.

    x1 = x + (1 - s) v
    mean = x + v dt + (n^2 dt / (2 s)) x1
    std = n sqrt(-dt)

with s = sigma, t = next sigma, dt = t - s < 0, n = noise level. It is finite at s = 1, and every step has a density.

Reference:
    Xue et al., "DanceGRPO: Unleashing GRPO on Visual Generation" (arXiv:2505.07818), and its public code (XueZeyue/DanceGRPO,
    `fastvideo/train_grpo_flux.py`). That writes x1 / s as (x - (1 - s) x0) / s^2, which cancels where s is small.
"""

from __future__ import annotations

import math

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
        The transition, whose coefficients are computed in float64 from the float32 sigmas and rounded once.
    """
    s, t = sigmas[step].item(), sigmas[step + 1].item()
    dt = t - s
    on_x1 = noise_level**2 * dt / (2 * s)
    return Transition.rounded(
        dynamics=DYNAMICS.name,
        on_latents=1 + on_x1,
        on_velocity=dt + on_x1 * (1 - s),
        std=noise_level * math.sqrt(-dt),
    )


DYNAMICS = Dynamics(name="dance", summary="Dance-SDE (DanceGRPO)", coefficients=coefficients, aliases=("dance_sde",))
