"""The declaration of a dynamics.

A dynamics is a rule that turns a grid of sigmas into transitions. It is one file beside this one, which ends with a `Dynamics`;
`dynamics.py` lists them. Requests, records, the command line, OpenAPI and the docs take names and limits from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from flowroll.sampling.transition import GAUSSIAN, LogProbForm, Transition

# (sigmas, step, noise level) -> the transition of that step. The grid is float32, on the CPU.
CoefficientsFunction: TypeAlias = Callable[[Float[Tensor, " states"], int, int | float], Transition]
# (sigmas, step) -> the rule that the sigma of that step breaks and the remedy, or None.
SigmaProblemFunction: TypeAlias = Callable[[Sequence[float], int], tuple[str, str] | None]

# Below it float32 no longer tells the noise from the rounding of the latents.
NOISE_LEVEL_MIN = 1e-4
NOISE_LEVEL_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRule:
    """How one step is taken.

    Attributes:
        dynamics: The name of the dynamics.
        noise_level: The noise level n.
    """

    dynamics: str
    noise_level: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamics:
    """One sampler: next ~ N(on_latents x + on_velocity v + on_previous x0_prev, std^2).

    Attributes:
        name: The name in requests and records.
        summary: A description in one line for help texts and OpenAPI, without a full stop.
        coefficients: Computes the transition of one step of a grid whose sigmas decrease at that step.
        aliases: Other names that requests may use.
        noise_level_max: The largest noise level.
        noise_level_max_is_open: Whether the noise level must stay below `noise_level_max`.
        is_stochastic: Whether its steps draw noise; at a noise level of 0 all steps of such a dynamics are ODE steps.
        needs_history: Whether its steps use x0_prev, the clean prediction of the step before.
        log_prob_form: The form of the log-prob in the method's own publication. A request chooses the form, whatever the
            dynamics.
        sigma_problem: Finds a step of a valid grid that the dynamics cannot take; None if it can take every step.
    """

    name: str
    summary: str
    coefficients: CoefficientsFunction
    aliases: tuple[str, ...] = ()
    noise_level_max: float = NOISE_LEVEL_MAX
    noise_level_max_is_open: bool = False
    is_stochastic: bool = True
    needs_history: bool = False
    log_prob_form: LogProbForm = GAUSSIAN
    sigma_problem: SigmaProblemFunction | None = None

    def admits(self, noise_level: int | float) -> bool:
        """Tells whether the noise level is 0 or within the limits."""
        if noise_level == 0:
            return True
        within = noise_level < self.noise_level_max if self.noise_level_max_is_open else noise_level <= self.noise_level_max
        return noise_level >= NOISE_LEVEL_MIN and within

    @property
    def noise_level_range(self) -> str:
        """The limits of the noise level in words, e.g. "0.0001 to 10"."""
        below = "below " if self.noise_level_max_is_open else ""
        return f"{NOISE_LEVEL_MIN} to {below}{self.noise_level_max:g}"
