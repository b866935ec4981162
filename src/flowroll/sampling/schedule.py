"""The sigma grid of a trajectory, from a checkpoint's scheduler configuration or from an explicit list.

Owns the arithmetic that turns a family's base grid into sigmas, in the dtypes and the order that diffusers'
`FlowMatchEulerDiscreteScheduler` uses, so that the grids agree bit for bit. It must not know about models or pixels: the family
says how many tokens an image has and which base grid it starts from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import UnsupportedModelError

ShiftType: TypeAlias = Literal["exponential", "linear"]


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
    """What of a `FlowMatchEulerDiscreteScheduler` configuration shapes the grid. Names and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    shift: int | float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: int | float = 0.5
    max_shift: int | float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: int | float | None = None
    time_shift_type: ShiftType = "exponential"

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, object]) -> ScheduleConfig:
        """Reads a scheduler's configuration (`scheduler/scheduler_config.json`).

        Raises:
            UnsupportedModelError: The configuration asks for a grid that flowroll does not compute.
        """
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise UnsupportedModelError(
                f"scheduler must be FlowMatchEulerDiscreteScheduler, got {name}; save the checkpoint with that scheduler."
            )
        unsupported = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
        for flag in unsupported:
            if config.get(flag):
                raise UnsupportedModelError(
                    f"scheduler option {flag} must be false, got true; set it to false and send explicit sigmas if need be."
                )
        known = {key: config[key] for key in cls.__slots__ if config.get(key) is not None}
        return cls(**known)  # type: ignore[arg-type]

    def mu(self, num_tokens: int) -> float:
        """The shift exponent of an image of `num_tokens` tokens, linear between the two calibrated sequence lengths."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        intercept = self.base_shift - slope * self.base_image_seq_len
        return num_tokens * slope + intercept


def linspace_float64(num_steps: int) -> Float[Tensor, " steps"]:
    """`1 .. 1/T` as numpy's linspace computes it in float64, rounded to float32 (the base grid of Qwen-Image's pipeline)."""
    if num_steps == 1:
        return torch.ones(1)
    stop = 1.0 / num_steps
    grid = torch.arange(num_steps, dtype=torch.float64) * ((stop - 1.0) / (num_steps - 1)) + 1.0
    grid[-1] = stop
    return grid.to(torch.float32)


def linspace_float32(num_steps: int) -> Float[Tensor, " steps"]:
    """`1 .. 1/T` as torch's linspace computes it in float32 (the base grid of Z-Image's pipeline)."""
    return torch.linspace(1.0, 1 / num_steps, num_steps)


def shifted_schedule(config: ScheduleConfig, base: Float[Tensor, " steps"], *, num_tokens: int) -> Schedule:
    """The checkpoint's own grid.

    Dynamic shift: sigma = e^mu / (e^mu + 1/u - 1) with mu linear in the number of tokens (or the linear form, mu in place
    of e^mu). Static shift: sigma = shift u / (1 + (shift - 1) u). Then, if configured, 1 - sigma is stretched so that the
    last step starts at `shift_terminal`; a grid of one step has nothing to stretch and stays at its base value (diffusers
    divides 0 by 0 there).

    Args:
        config: The checkpoint's scheduler configuration.
        base: The family's base grid u, float32, from 1 down.
        num_tokens: Image tokens of one sample.

    Returns:
        T sigmas followed by 0, and the timesteps.
    """
    if config.use_dynamic_shifting:
        mu = config.mu(num_tokens)
        # A tensor, because torch computes `number / tensor` as a reciprocal and a product: one rounding too many.
        factor = torch.tensor(math.exp(mu) if config.time_shift_type == "exponential" else mu, dtype=torch.float32)
        sigmas = factor / (factor + (1 / base - 1))
    else:
        sigmas = config.shift * base / (1 + (config.shift - 1) * base)
    if config.shift_terminal and len(base) > 1:
        one_minus = 1 - sigmas
        sigmas = 1 - one_minus / (one_minus[-1] / (1 - config.shift_terminal))
    return Schedule(sigmas=torch.cat([sigmas, torch.zeros(1)]), timesteps=sigmas * config.num_train_timesteps)


def explicit_schedule(config: ScheduleConfig, sigmas: Sequence[int | float]) -> Schedule:
    """A grid used verbatim: T + 1 values, the last 0, rounded to float32."""
    grid = torch.tensor(sigmas, dtype=torch.float32)
    return Schedule(sigmas=grid, timesteps=grid[:-1] * config.num_train_timesteps)
