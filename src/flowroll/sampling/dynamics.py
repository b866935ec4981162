"""The dynamics by name, and which transition each step of a trajectory follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.sampling import cps, dance, flow_sde, ode, transition
from flowroll.sampling.base import Dynamics
from flowroll.sampling.transition import ODE, Transition

DYNAMICS: Mapping[str, Dynamics] = {module.DYNAMICS.name: module.DYNAMICS for module in (flow_sde, cps, dance, ode)}
# Every name that a request may use, and the dynamics that it means.
_BY_ANY_NAME: Mapping[str, Dynamics] = {name: found for found in DYNAMICS.values() for name in (found.name, *found.aliases)}
NAMES = tuple(_BY_ANY_NAME)


def dynamics_named(name: str, *, field: str = "sde_type") -> Dynamics:
    """The dynamics of a name or an alias.

    Args:
        name: As a request or a record has it.
        field: What an error calls it.

    Raises:
        InvalidRequestError: There is none of that name.
    """
    found = _BY_ANY_NAME.get(name)
    if found is None:
        known = ", ".join(DYNAMICS)
        raise InvalidRequestError(f"{field} must be one of {known}, got {name[:80]!r}; choose one of these.", field=field)
    return found


def noise_level_help() -> str:
    """The limits of the noise level, by dynamics."""
    ranges: dict[str, list[str]] = {}
    for found in DYNAMICS.values():
        ranges.setdefault(found.noise_level_range, []).append(found.name)
    return "; ".join(f"{limits} for {', '.join(names)}" for limits, names in ranges.items())


def transitions(
    sigmas: Float[Tensor, " states"],
    *,
    sde_type: str,
    noise_level: int | float,
    sde_step_indices: Collection[int] | None = None,
) -> tuple[Transition, ...]:
    """The T transitions of a grid.

    Args:
        sigmas: T + 1 noise levels, float32.
        sde_type: Dynamics of the chosen steps.
        noise_level: n; at 0 every step of a stochastic dynamics is an ODE step.
        sde_step_indices: The chosen steps; None: all. The others are ODE steps.

    Returns:
        One transition per step. A rollout says which of its steps had a density, and from that alone the same transitions
        have to follow. So a step that has none under the dynamics (the last one of CPS) follows it if all steps with a density
        do, chosen or not; otherwise it is an ODE step.

    Raises:
        InvalidRequestError: There is no such dynamics, or it cannot take one of its steps.
    """
    chosen = dynamics_named(sde_type)
    steps = check_sigmas(sigmas, chosen, noise_level=noise_level, sde_step_indices=sde_step_indices)
    plain = tuple(ode.DYNAMICS.coefficients(sigmas, step, noise_level) for step in range(sigmas.shape[0] - 1))
    if _takes_ode_steps(chosen, noise_level):
        return plain
    own = tuple(chosen.coefficients(sigmas, step, noise_level) for step in range(sigmas.shape[0] - 1))
    dense = {step for step in steps if own[step].is_stochastic}
    if not any(this.is_stochastic for step, this in enumerate(own) if step not in dense):
        return own
    return tuple(own[step] if step in dense else plain[step] for step in range(sigmas.shape[0] - 1))


def _takes_ode_steps(chosen: Dynamics, noise_level: int | float) -> bool:
    return chosen.name == ODE or (chosen.is_stochastic and noise_level == 0)


def check_sigmas(
    sigmas: Float[Tensor, " states"],
    chosen: Dynamics,
    *,
    noise_level: int | float,
    sde_step_indices: Collection[int] | None = None,
) -> Collection[int]:
    """Refuses a grid on which the dynamics cannot take one of its steps; the other arguments are those of `transitions`.

    Returns:
        The steps that follow the dynamics.

    Raises:
        InvalidRequestError: Names the sigma and its step.
    """
    if _takes_ode_steps(chosen, noise_level):
        return ()
    every = range(sigmas.shape[0] - 1)
    steps = every if sde_step_indices is None else set(sde_step_indices) & set(every)
    values = sigmas.tolist()
    for step in sorted(steps):
        problem: tuple[str, str] | None = None
        if not 0 <= values[step + 1] < values[step] <= 1:
            problem = "decrease at every step, from at most 1 to 0", "correct that value"
        elif chosen.sigma_problem is not None:
            problem = chosen.sigma_problem(values, step)
        if problem is not None:
            rule, remedy = problem
            raise InvalidRequestError(f"sigmas must {rule}, got {values[step]:.9g} at step {step}; {remedy}.", field="sigmas")
    return steps


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
    return ode.step(latents, velocity, dt) if this.dynamics == ODE else transition.mean(this, latents, velocity)


def amplification(chosen: Sequence[Transition]) -> float:
    """The largest factor by which the latents at any step can grow over the steps after it, velocities aside.

    A strong Flow-SDE multiplies its latents by far more than 1 at every step: at n = 10 by up to 1e25 in 50 steps.
    """
    largest = product = 1.0
    for this in chosen:
        product = max(product * abs(this.on_latents), 1.0)
        largest = max(largest, product)
    return largest
