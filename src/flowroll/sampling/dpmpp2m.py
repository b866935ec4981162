"""DPM-Solver++(2M), a deterministic solver of second order that uses the clean prediction of the step before.

    x0 = x - s v,  lambda(s) = log((1 - s) / s)
    w = (lambda(t) - lambda(s)) / (2 (lambda(s) - lambda(p)))
    next = (t / s) x + (1 - t / s) ((1 + w) x0 - w x0_prev)

with s = sigma, t = next sigma, p = sigma of the step before. Without w it is the Euler step of the ODE. The first step and the
last one (t = 0) are of first order, and so is the second one of a grid that begins at 1, where lambda(p) is infinite. The step
before may follow any dynamics, as in MixGRPO-Flash, which samples with this solver behind its stochastic window.

Reference:
    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (arXiv:2211.01095), with
    alpha = 1 - s; the midpoint form of diffusers' `DPMSolverMultistepScheduler`. MixGRPO (arXiv:2507.21802).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.base import Dynamics
from flowroll.sampling.transition import Transition


def coefficients(sigmas: Float[Tensor, " states"], step: int, noise_level: int | float) -> Transition:
    """Computes the transition of one step.

    Args:
        sigmas: The whole grid, float32.
        step: The step, counted from 0.
        noise_level: Has no effect on a deterministic step.

    Returns:
        The transition, whose coefficients are computed in float64 from the float32 sigmas and rounded once.
    """
    on_latents, on_velocity, on_previous = factors(sigmas.tolist(), step)
    return Transition.rounded(
        dynamics=DYNAMICS.name, on_latents=on_latents, on_velocity=on_velocity, std=0.0, on_previous=on_previous
    )


def factors(sigmas: Sequence[float], step: int) -> tuple[float, float, float]:
    """Computes the factors of x, v and x0_prev of one step in float64."""
    s, t = sigmas[step], sigmas[step + 1]
    previous = sigmas[step - 1] if step else 1.0
    weight = 0.0
    if t > 0 and previous < 1:
        weight = (_log_snr(t) - _log_snr(s)) / (2 * (_log_snr(s) - _log_snr(previous)))
    share = (s - t) / s
    return 1 + share * weight, (t - s) * (1 + weight), -share * weight


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


DYNAMICS = Dynamics(
    name="dpmpp2m",
    summary="DPM-Solver++(2M), deterministic, of second order",
    coefficients=coefficients,
    is_stochastic=False,
    needs_history=True,
)
