"""The sigma grid of a trajectory, from a checkpoint's scheduler configuration or from an explicit list.

Owns the arithmetic that turns a family's base grid into sigmas, in the dtypes and the order that diffusers'
`FlowMatchEulerDiscreteScheduler` uses, so that the grids agree bit for bit. It must not know about models or pixels: the family
says how many tokens an image has and which base grid it starts from.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import CheckpointError, InvalidRequestError, UnsupportedModelError

ShiftType: TypeAlias = Literal["exponential", "linear"]

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# Options of the scheduler that change the grid in a way that is not computed here.
_UNSUPPORTED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
# Larger than every number that a scheduler is calibrated with, and far within the range of float32.
_MAX_NUMBER = 1e6
# The exponential of this shift is finite in float64 and infinite in float32.
_MAX_EXPONENT = 700.0
# The largest first sigma: the shift rounds one of 1 to one of its neighbors.
MAX_SIGMA = 1 + 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The grid of one trajectory of T steps; float32 on the CPU.

    Attributes:
        sigmas: T + 1 noise levels, from noise (1) to data (0).
        timesteps: T timesteps as the model's schedule has them (sigma times the number of training timesteps).
    """

    sigmas: Float[Tensor, " states"]
    timesteps: Float[Tensor, " steps"]

    @property
    def num_steps(self) -> int:
        """The number of transitions T."""
        return self.timesteps.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The options of a `FlowMatchEulerDiscreteScheduler` that shape the grid, with the names and defaults of diffusers."""

    num_train_timesteps: int = 1000
    shift: int | float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: int | float = 0.5
    max_shift: int | float = 1.15
    base_image_seq_len: int | float = 256
    max_image_seq_len: int | float = 4096
    shift_terminal: int | float | None = None
    time_shift_type: ShiftType = "exponential"

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, object]) -> ScheduleConfig:
        """Reads a scheduler's configuration (`scheduler/scheduler_config.json`).

        Options that diffusers does not know are ignored, as diffusers does.

        Raises:
            UnsupportedModelError: The configuration asks for a grid that flowroll does not compute.
            CheckpointError: No grid can be computed from a value of the configuration.
        """
        name = config.get("_class_name", _SCHEDULER)
        if name != _SCHEDULER:
            raise UnsupportedModelError(f"scheduler must be {_SCHEDULER}, got {name}; save the checkpoint with that scheduler.")
        for flag in _UNSUPPORTED:
            if config.get(flag):
                raise UnsupportedModelError(
                    f"scheduler option {flag} must be false, got {_shown(config[flag])}; set it to false and send explicit "
                    "sigmas if need be."
                )
        known = {key: config[key] for key in cls.__slots__ if config.get(key) is not None}
        _check_values({field.name: field.default for field in fields(cls)} | known)
        return cls(**known)  # type: ignore[arg-type]

    def mu(self, num_tokens: int) -> float:
        """Returns the shift exponent of an image of `num_tokens` tokens, linear between the two calibrated lengths."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        intercept = self.base_shift - slope * self.base_image_seq_len
        return num_tokens * slope + intercept


def _check_values(values: Mapping[str, Any]) -> None:
    """Refuses values for which the arithmetic below divides by zero, leaves float32 or does not descend from 1 to 0."""

    def check(key: str, rule: str, is_met: bool, remedy: str = "correct scheduler_config.json") -> None:
        if not is_met:
            raise CheckpointError(f"scheduler option {key} must {rule}, got {_shown(values[key])}; {remedy}.")

    steps, terminal, is_dynamic = values["num_train_timesteps"], values["shift_terminal"], values["use_dynamic_shifting"]
    check("num_train_timesteps", "be an integer from 1 to 1000000", type(steps) is int and 1 <= steps <= _MAX_NUMBER)
    check("use_dynamic_shifting", "be true or false", isinstance(is_dynamic, bool))
    check("time_shift_type", "be exponential or linear", values["time_shift_type"] in get_args(ShiftType))
    check("shift_terminal", "be a number from 0 to below 1", terminal is None or (_is_number(terminal) and 0 <= terminal < 1))
    for key in ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        check(key, f"be a number of at most {_MAX_NUMBER:g}", _is_number(values[key]))
    if not is_dynamic:
        check("shift", "be above 0", values["shift"] > 0)
        return
    # The shift is linear between the two lengths; diffusers divides by their difference too.
    check(
        "max_image_seq_len",
        f"differ from base_image_seq_len ({values['base_image_seq_len']})",
        values["max_image_seq_len"] != values["base_image_seq_len"],
        "for the same shift at every size set max_shift to base_shift and keep two lengths",
    )


def _is_number(value: object) -> bool:
    # The value is compared and not converted, because an integer may exceed all floats. A comparison with NaN is False.
    return type(value) in (int, float) and abs(value) <= _MAX_NUMBER  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:80]


def linspace_float64(num_steps: int) -> Float[Tensor, " steps"]:
    """Returns `1 .. 1/T` as numpy's linspace computes it in float64, rounded to float32 (Qwen-Image's base grid)."""
    if num_steps == 1:
        return torch.ones(1)
    stop = 1.0 / num_steps
    grid = torch.arange(num_steps, dtype=torch.float64) * ((stop - 1.0) / (num_steps - 1)) + 1.0
    grid[-1] = stop
    return grid.to(torch.float32)


def linspace_float32(num_steps: int) -> Float[Tensor, " steps"]:
    """Returns `1 .. 1/T` as torch's linspace computes it in float32 (the base grid of Z-Image's pipeline)."""
    return torch.linspace(1.0, 1 / num_steps, num_steps)


def scheduler_grid(config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
    """Returns the scheduler's own base grid in float64, for pipelines that pass a number of steps and no sigmas.

    It runs from the largest to the smallest sigma that the scheduler knows, and with a static shift these are shifted already.
    """
    steps = config.num_train_timesteps
    ends = torch.tensor([steps, 1], dtype=torch.float32) / steps
    if not config.use_dynamic_shifting:
        ends = config.shift * ends / (1 + (config.shift - 1) * ends)
    first, last = (sigma * steps for sigma in ends.tolist())
    if num_steps == 1:
        return torch.tensor([first], dtype=torch.float64) / steps
    grid = torch.arange(num_steps, dtype=torch.float64) * ((last - first) / (num_steps - 1)) + first
    grid[-1] = last
    return torch.div(grid, steps)


def shifted_schedule(
    config: ScheduleConfig, base: Float[Tensor, " steps"], *, num_tokens: int, mu: float | None = None
) -> Schedule:
    """Computes the checkpoint's own grid.

    Dynamic shift: sigma = e^mu / (e^mu + 1/u - 1) (or the linear form, mu in place of e^mu). Static shift: sigma =
    shift u / (1 + (shift - 1) u). Then, if configured, 1 - sigma is stretched so that the last step starts at
    `shift_terminal`; a grid of one step has nothing to stretch and stays at its base value (diffusers divides 0 by 0 there).

    Args:
        config: The checkpoint's scheduler configuration.
        base: The family's base grid u, from 1 down, in the dtype that the pipeline computes in.
        num_tokens: Image tokens of one sample.
        mu: The exponent of a dynamic shift; None: linear in the number of tokens, as the configuration says.

    Returns:
        T sigmas followed by 0, and the timesteps.

    Raises:
        InvalidRequestError: The shift is calibrated for other sizes; at this one the grid does not descend from at most 1 to 0.
    """
    if config.use_dynamic_shifting:
        mu = config.mu(num_tokens) if mu is None else mu
        if config.time_shift_type == "exponential":
            # Beyond float32's range the grid is refused below.
            mu = math.exp(min(mu, _MAX_EXPONENT))
        # A tensor, because torch computes `number / tensor` as a reciprocal and a product: one rounding too many.
        factor = torch.tensor(mu, dtype=base.dtype)
        sigmas = factor / (factor + (1 / base - 1))
    else:
        sigmas = config.shift * base / (1 + (config.shift - 1) * base)
    if config.shift_terminal and len(base) > 1:
        one_minus = 1 - sigmas
        sigmas = 1 - one_minus / (one_minus[-1] / (1 - config.shift_terminal))
    sigmas = sigmas.to(torch.float32)
    grid = torch.cat([sigmas, torch.zeros(1)])
    levels = grid.tolist()
    # The comparison is written so that NaN is refused.
    if not (levels[0] <= MAX_SIGMA and all(later < earlier for earlier, later in itertools.pairwise(levels))):
        raise InvalidRequestError(
            f"sigmas must descend from at most 1 to 0, got {_shown(levels)} from the checkpoint's scheduler at "
            f"{num_tokens} image tokens; send explicit sigmas, or ask for another size.",
            field="sigmas",
        )
    return Schedule(sigmas=grid, timesteps=sigmas * config.num_train_timesteps)


def explicit_schedule(config: ScheduleConfig, sigmas: Sequence[int | float]) -> Schedule:
    """Makes a schedule from T + 1 explicit sigmas, of which the last is 0; they are only rounded to float32."""
    grid = torch.tensor(sigmas, dtype=torch.float32)
    return Schedule(sigmas=grid, timesteps=grid[:-1] * config.num_train_timesteps)
