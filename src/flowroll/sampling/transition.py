"""One transition of a trajectory, and the only log-prob code of the project.

Every sampler here is a Gaussian whose mean is affine in the latents, the velocity and the clean prediction of the step before,
so a step is five facts: its dynamics, the three factors of the mean and the total std. The samplers compute these facts from
the sigmas, one sampler per file; this module applies them and computes log-probs, for the engine and for replay alike. The
log-prob is that of the stored tensor: `next_latents` after all rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# The dynamics whose steps are taken by `ode.step`, in the plain pipeline's dtypes. Steps that are not chosen follow it too.
ODE = "ode"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbForm:
    """What is counted as the log-prob of a step; each form differs from the others by known numbers.

    Attributes:
        reduce: "mean" or "sum" over the elements of a sample's latents.
        constants: Whether -log std - log sqrt(2 pi) of each element counts.
        inverse_variance: Whether the squared error is divided by 2 std^2.
    """

    reduce: Literal["mean", "sum"] = "mean"
    constants: bool = True
    inverse_variance: bool = True


# The log-density per element, and minus the mean squared error.
GAUSSIAN = LogProbForm()
NO_CONST = LogProbForm(constants=False, inverse_variance=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """next ~ N(on_latents * x + on_velocity * v + on_previous * x0_prev, std^2), for latents x and velocity v.

    Attributes:
        dynamics: The name of the dynamics that made the transition. `ode.step` executes "ode" steps, in its dtypes.
        on_latents: Factor of x, a float32 value.
        on_velocity: Factor of v, a float32 value.
        std: Total std, a float32 value; 0 for a deterministic step.
        on_previous: Factor of x0_prev, the clean prediction x - s v of the step before, a float32 value.
    """

    dynamics: str
    on_latents: float
    on_velocity: float
    std: float
    on_previous: float = 0.0

    @classmethod
    def rounded(cls, *, dynamics: str, **values: float) -> Transition:
        """Makes a transition from float64 values, each rounded to float32 once."""
        exact = torch.tensor(list(values.values()), dtype=torch.float64)
        return cls(dynamics=dynamics, **dict(zip(values, exact.to(torch.float32).tolist(), strict=True)))

    @classmethod
    def toward_noise(cls, *, dynamics: str, sigma: float, sigma_next: float, on_x1: float, std: float) -> Transition:
        """Makes the transition with the mean (1 - t) x0 + on_x1 x1, for x0 = x - s v and x1 = x + (1 - s) v.

        Args:
            dynamics: The name of the dynamics.
            sigma: s.
            sigma_next: t.
            on_x1: Factor of the predicted noise x1.
            std: Total std.
        """
        on_x0 = 1 - sigma_next
        return cls.rounded(
            dynamics=dynamics, on_latents=on_x0 + on_x1, on_velocity=on_x1 * (1 - sigma) - on_x0 * sigma, std=std
        )

    @property
    def needs_previous(self) -> bool:
        """Whether the mean depends on the clean prediction of the step before."""
        return self.on_previous != 0

    @property
    def is_stochastic(self) -> bool:
        """Whether the step draws noise and has a density."""
        return self.std > 0


def mean(
    transition: Transition,
    latents: Float[Tensor, " *shape"],
    velocity: Float[Tensor, " *shape"],
    previous: Float[Tensor, " *shape"] | None = None,
) -> Float[Tensor, " *shape"]:
    """Computes the mean of the next latents in float32, differentiable in the velocity.

    Args:
        transition: A step of any dynamics but the ODE.
        latents: x at sigma, any float dtype; taken to float32 first.
        velocity: v, any float dtype; taken to float32 first.
        previous: x0_prev, float32; needed exactly if the transition has a factor for it.

    Returns:
        on_latents * x + on_velocity * v + on_previous * x0_prev, float32.
    """
    found = latents.to(torch.float32) * transition.on_latents + velocity.to(torch.float32) * transition.on_velocity
    if not transition.needs_previous:
        return found
    assert previous is not None
    return found + previous * transition.on_previous


def clean_prediction(
    latents: Float[Tensor, " *latent"], velocity: Float[Tensor, " *latent"], sigma: float
) -> Float[Tensor, " *latent"]:
    """Computes x - s v, the clean latents that a velocity predicts, in float32; `sigma` is a float32 value."""
    return latents.to(torch.float32) - velocity.to(torch.float32) * sigma


def sample(
    transition: Transition, mean: Float[Tensor, " *shape"], noise: Float[Tensor, " *shape"] | None
) -> Float[Tensor, " *shape"]:
    """Computes mean + std * noise in float32, or returns the mean itself if the step is deterministic.

    Args:
        transition: The step that `mean` belongs to.
        mean: The result of `mean`, float32.
        noise: Standard normal noise, float32; None exactly for deterministic steps.

    Returns:
        The next latents, float32.
    """
    assert (noise is not None) == transition.is_stochastic
    return mean if noise is None else mean + noise * transition.std


def log_prob(
    transition: Transition,
    next_latents: Float[Tensor, " batch *latent"],
    mean: Float[Tensor, " batch *latent"],
    *,
    form: LogProbForm = GAUSSIAN,
) -> Float[Tensor, " batch"]:
    """Computes the log-density of the next latents in one of its forms, by default averaged over the elements of a sample.

    With D elements, q = (1/D) sum (next - mean)^2 and c = log std + log sqrt(2 pi):

        log_prob = -q / (2 std^2) - c

    Without `inverse_variance` the first term is -q, without `constants` there is no c, and for the sum q and c are D times as
    large.

    Each row is reduced on its own, as a full reduction of one sample: a reduction over a batch may sum in another order.

    Args:
        transition: The step that `mean` belongs to.
        next_latents: The latents that were stored, any float dtype.
        mean: The result of `mean`, float32.
        form: What counts.

    Returns:
        The log-prob, float32; exactly 0 if the step is deterministic and has no density.

    Reference:
        Flow-GRPO (arXiv:2505.05470) takes the mean, not the sum, over a sample's elements. `NO_CONST` is FlowCPS's form
        (arXiv:2509.05952), which SGLang applies to Flow-SDE as well.
    """
    if not transition.is_stochastic:
        return mean.new_zeros(mean.shape[0], dtype=torch.float32)
    difference = next_latents.to(torch.float32) - mean
    squares = [row.square() for row in difference.unbind(0)]
    is_sum = form.reduce == "sum"
    log_probs = -torch.stack([row.sum() if is_sum else row.mean() for row in squares])
    if form.inverse_variance:
        log_probs = log_probs / (2 * transition.std**2)
    if form.constants:
        count = squares[0].numel() if is_sum else 1
        log_probs = log_probs - count * (math.log(transition.std) + _HALF_LOG_2PI)
    return log_probs
