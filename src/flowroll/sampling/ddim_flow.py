"""DDIM for flow matching, the stochastic sampler of DiffusionNFT.

    std = n t sqrt(1 - (t (1 - s) / (s (1 - t)))^2)
    x0 = x - s v,  x1 = x + (1 - s) v
    mean = (1 - t) x0 + sqrt(t^2 - std^2) x1

with s = sigma, t = next sigma, n = noise level in (0, 1]. At n = 1 it is the first-order SDE solver of DPM-Solver++, which
MixGRPO has. The last step (t = 0) has std 0: it is deterministic.

Reference:
    Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (arXiv:2509.16117), and its public code
    (NVlabs/DiffusionNFT). Song et al., "Denoising Diffusion Implicit Models" (arXiv:2010.02502): eta = n in equation 16.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.base import Dynamics
from flowroll.sampling.transition import Transition


def coefficients(sigmas: Float[Tensor, " states"], step: int, noise_level: int | float) -> Transition:
    """Computes the transition of one step, with the mean written as factors of latents and velocity.

    Args:
        sigmas: The whole grid, float32.
        step: The step, counted from 0.
        noise_level: The noise level n in (0, 1].

    Returns:
        The transition, whose coefficients are computed in float64 from the float32 sigmas and rounded once.
    """
    s, t = sigmas[step].item(), sigmas[step + 1].item()
    kept = t * (1 - s) / (s * (1 - t))
    std = noise_level * t * math.sqrt((1 - kept) * (1 + kept))
    on_x1 = math.sqrt(max(t * t - std * std, 0.0))
    return Transition.toward_noise(dynamics=DYNAMICS.name, sigma=s, sigma_next=t, on_x1=on_x1, std=std)


DYNAMICS = Dynamics(
    name="ddim_flow",
    summary="DDIM for flow matching (DiffusionNFT)",
    coefficients=coefficients,
    noise_level_max=1.0,
)
