"""The dynamics by name, and the transition that each step of a trajectory follows."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.sampling import cps, dance, ddim_flow, dpmpp2m, flow_sde, ode, transition
from flowroll.sampling.base import Dynamics, StepRule
from flowroll.sampling.schedule import MAX_SIGMA
from flowroll.sampling.transition import ODE, Transition

DYNAMICS: Mapping[str, Dynamics] = {
    module.DYNAMICS.name: module.DYNAMICS for module in (flow_sde, cps, dance, ddim_flow, ode, dpmpp2m)
}
# Every name that a request may use, and the dynamics that it means.
_BY_ANY_NAME: Mapping[str, Dynamics] = {name: found for found in DYNAMICS.values() for name in (found.name, *found.aliases)}
NAMES = tuple(_BY_ANY_NAME)
_PLAIN = StepRule(dynamics=ODE, noise_level=0)
# Grids whose transitions are kept; one of a thousand steps takes 0.2 MB.
_MOST_GRIDS = 64


def dynamics_named(name: str, *, field: str = "sde_type") -> Dynamics:
    """Returns the dynamics of a name or an alias.

    Args:
        name: The name in a request or a record.
        field: The name of the field in an error message.

    Raises:
        InvalidRequestError: There is no dynamics of that name.
    """
    found = _BY_ANY_NAME.get(name)
    if found is None:
        known = ", ".join(DYNAMICS)
        raise InvalidRequestError(f"{field} must be one of {known}, got {name[:80]!r}; choose one of these.", field=field)
    return found


def noise_level_help() -> str:
    """Returns the limits of the noise level by dynamics, as a text for help."""
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
    """Computes the T transitions of a grid whose chosen steps follow one dynamics.

    Args:
        sigmas: T + 1 noise levels, float32.
        sde_type: The dynamics of the chosen steps.
        noise_level: The noise level n; at 0 every step of a stochastic dynamics is an ODE step.
        sde_step_indices: The chosen steps; None: all. The others are ODE steps.

    Returns:
        One transition per step. A rollout says which of its steps had a density, and the same transitions must follow from that
        alone. So a step without a density under the dynamics (the last one of CPS), whether chosen or not, follows the dynamics
        if all steps with a density do; otherwise it is an ODE step.

    Raises:
        InvalidRequestError: There is no such dynamics, or it cannot take one of its steps.
    """
    rules = rules_of(sigmas, sde_type=sde_type, noise_level=noise_level, sde_step_indices=sde_step_indices)
    return _taken(tuple(sigmas.tolist()), rules)


def rules_of(
    sigmas: Float[Tensor, " states"],
    *,
    sde_type: str,
    noise_level: int | float,
    sde_step_indices: Collection[int] | None = None,
) -> tuple[StepRule, ...]:
    """Returns the rules of the T steps that `transitions` takes; arguments and errors are its own."""
    every = range(sigmas.shape[0] - 1)
    chosen = StepRule(dynamics=dynamics_named(sde_type).name, noise_level=noise_level)
    steps = every if sde_step_indices is None else set(sde_step_indices) & set(every)
    check_sigmas(sigmas, {step: chosen for step in steps})
    taken = _taken(tuple(sigmas.tolist()), (chosen,) * len(every))
    stochastic = {step for step in every if taken[step].is_stochastic}
    if stochastic <= set(steps):
        return (chosen,) * len(every)
    return tuple(chosen if step in stochastic & set(steps) else _PLAIN for step in every)


def transitions_of(sigmas: Float[Tensor, " states"], rules: Sequence[StepRule]) -> tuple[Transition, ...]:
    """Computes the T transitions of a grid whose steps each have a rule of their own.

    Args:
        sigmas: T + 1 noise levels, float32.
        rules: One rule a step. A step of a stochastic dynamics with a noise level of 0 is an ODE step.

    Raises:
        InvalidRequestError: There is no dynamics of a name, or it cannot take its step.
    """
    assert len(rules) == sigmas.shape[0] - 1
    check_sigmas(sigmas, dict(enumerate(rules)))
    return _taken(tuple(sigmas.tolist()), tuple(rules))


def check_sigmas(sigmas: Float[Tensor, " states"], rules: Mapping[int, StepRule]) -> None:
    """Refuses a grid on which a step cannot be taken by its rule.

    Args:
        sigmas: T + 1 noise levels, float32.
        rules: The rules by step; steps that are not in it are ODE steps, which can be taken on every grid.

    Raises:
        InvalidRequestError: A step cannot be taken; the message names the sigma and its step.
    """
    values = sigmas.tolist()
    for step, rule in sorted(rules.items()):
        chosen = dynamics_named(rule.dynamics)
        if _is_plain(chosen, rule.noise_level):
            continue
        problem: tuple[str, str] | None = None
        if not 0 <= values[step + 1] < values[step] <= (1 if step else MAX_SIGMA):
            problem = "decrease at every step, from at most 1 to 0", "correct that value"
        elif chosen.sigma_problem is not None:
            problem = chosen.sigma_problem(values, step)
        if problem is not None:
            text, remedy = problem
            raise InvalidRequestError(f"sigmas must {text}, got {values[step]:.9g} at step {step}; {remedy}.", field="sigmas")


def _is_plain(chosen: Dynamics, noise_level: int | float) -> bool:
    """Returns whether steps of these dynamics at this noise level are ODE steps."""
    return chosen.name == ODE or (chosen.is_stochastic and noise_level == 0)


@functools.lru_cache(maxsize=_MOST_GRIDS)
def _taken(sigmas: tuple[float, ...], rules: tuple[StepRule, ...]) -> tuple[Transition, ...]:
    """Returns the transitions of a grid. Requests have few grids, and each of their steps costs a dozen small operations."""
    grid = torch.tensor(sigmas, dtype=torch.float32)

    def taken(step: int, rule: StepRule) -> Transition:
        chosen = dynamics_named(rule.dynamics)
        takes = ode.DYNAMICS if _is_plain(chosen, rule.noise_level) else chosen
        return takes.coefficients(grid, step, rule.noise_level)

    return tuple(taken(step, rule) for step, rule in enumerate(rules))


def step_mean(
    this: Transition,
    latents: Float[Tensor, " *latent"],
    velocity: Float[Tensor, " *latent"],
    dt: Float[Tensor, ""],
    previous: Float[Tensor, " *latent"] | None = None,
) -> Float[Tensor, " *latent"]:
    """Computes the mean of the next latents by the step's own rule.

    Args:
        this: The transition of the step.
        latents: x at sigma, any float dtype.
        velocity: v, any float dtype.
        dt: Next sigma minus sigma, float32, on the latents' device; used by ODE steps alone.
        previous: x0_prev, the `clean_prediction` of the step before; needed exactly if the transition has a factor for it.

    Returns:
        The mean, float32; at an ODE step the next latents, in the velocity's dtype.
    """
    if this.dynamics == ODE:
        return ode.step(latents, velocity, dt)
    return transition.mean(this, latents, velocity, previous)


def next_dtype(this: Transition, velocity_dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the latents after a step: an ODE step has that of its velocity, every other one is in float32."""
    return velocity_dtype if this.dynamics == ODE else torch.float32


def amplification(chosen: Sequence[Transition]) -> float:
    """Returns the largest factor by which the latents at any step can grow over the later steps, without the velocities.

    A strong Flow-SDE multiplies its latents by far more than 1 at every step: at n = 10 by up to 1e25 in 50 steps.
    """
    largest = product = 1.0
    for this in chosen:
        product = max(product * (abs(this.on_latents) + abs(this.on_previous)), 1.0)
        largest = max(largest, product)
    return largest
