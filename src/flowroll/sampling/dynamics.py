"""Which transition each step of a trajectory follows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxtyping import Float
from torch import Tensor

from flowroll.sampling import cps, flow_sde, ode, transition
from flowroll.sampling.transition import Transition
from flowroll.types import SdeType


def transitions(
    sigmas: Float[Tensor, " states"],
    *,
    sde_type: SdeType,
    noise_level: int | float,
    sde_step_indices: Collection[int] | None = None,
) -> tuple[Transition, ...]:
    """The T transitions of a grid.

    Args:
        sigmas: T + 1 noise levels, float32.
        sde_type: Dynamics of the chosen steps.
        noise_level: n; at 0 every step is an ODE step.
        sde_step_indices: The chosen steps; None: all. The others are ODE steps.

    Returns:
        One transition per step.
    """
    return tuple(
        _transition(sigmas, step, sde_type if _chosen(step, noise_level, sde_step_indices) else "ode", noise_level)
        for step in range(sigmas.shape[0] - 1)
    )


def step_mean(
    this: Transition, latents: Float[Tensor, " *latent"], velocity: Float[Tensor, " *latent"], dt: Float[Tensor, ""]
) -> Float[Tensor, " *latent"]:
    """The mean of the next latents, by the step's own rule.

    Args:
        this: The step.
        latents: x at sigma, any float dtype.
        velocity: v, any float dtype.
        dt: Next sigma minus sigma, float32, on the latents' device; used by ODE steps alone.

    Returns:
        float32; at an ODE step the next latents, in the velocity's dtype.
    """
    return ode.step(latents, velocity, dt) if this.dynamics == "ode" else transition.mean(this, latents, velocity)


def amplification(chosen: Sequence[Transition]) -> float:
    """The largest factor by which the latents at any step can grow over the steps after it, velocities aside.

    A strong Flow-SDE multiplies its latents by far more than 1 at every step: at n = 10 by up to 1e25 in 50 steps.
    """
    largest = product = 1.0
    for this in chosen:
        product = max(product * abs(this.on_latents), 1.0)
        largest = max(largest, product)
    return largest


def _chosen(step: int, noise_level: int | float, sde_step_indices: Collection[int] | None) -> bool:
    return noise_level > 0 and (sde_step_indices is None or step in sde_step_indices)


def _transition(sigmas: Tensor, step: int, dynamics: SdeType, noise_level: int | float) -> Transition:
    sigma, sigma_next = sigmas[step], sigmas[step + 1]
    if dynamics == "sde":
        return flow_sde.transition(sigma, sigma_next, sigmas[1], noise_level)
    if dynamics == "cps":
        return cps.transition(sigma, sigma_next, noise_level)
    return Transition(dynamics="ode", on_latents=1.0, on_velocity=(sigma_next - sigma).item(), std=0.0)
