"""Some steps of a rollout, and several rollouts as one: what is behind `rollout[2:5]` and `Rollout.stack`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.sampling.dynamics import dynamics_named
from flowroll.types.shown import Shown, with_tensors

if TYPE_CHECKING:
    from flowroll.types.results import Rollout

Steps: TypeAlias = slice | int | Sequence[int]
# The fields of `StepTensors` by the debug tensors that hold the same.
_FIELD_OF_DEBUG = {
    "model_output": "velocity",
    "prev_sample_mean": "mean",
    "noise_std_dev": "std",
    "variance_noise": "noise",
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RolloutStack(Shown):
    """The tensors of several rollouts, stacked; the first dimension of a stacked tensor is the rollout.

    Attributes:
        prompts: The prompt of each rollout.
        seeds: The seed of each rollout.
        weight_versions: The version of the weights that made each.
        images: The pictures; None where they are PNG files, or there are none.
        log_probs: The log-prob of each step; None for evaluations.
        sde_step_indices: The steps that have a density, which are the same in all; None for evaluations.
        latents: The latents of the trajectories; None where there are none.
        latent_step_indices: The state (0..T) of each of these latents.
        timesteps: T timesteps as the model's schedule has them, float32.
        sigmas: T + 1 noise levels, float32.
    """

    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    weight_versions: tuple[str, ...]
    images: Float[Tensor, " rollouts colors frames height width"] | UInt8[Tensor, " rollouts colors frames height width"] | None
    log_probs: Float[Tensor, " rollouts steps"] | None
    sde_step_indices: tuple[int, ...] | None
    latents: Float[Tensor, " rollouts kept *latent"] | None
    latent_step_indices: tuple[int, ...] | None
    timesteps: Float[Tensor, " steps"]
    sigmas: Float[Tensor, " states"]

    def __len__(self) -> int:
        return len(self.seeds)

    def to(self, device: torch.device | str) -> RolloutStack:
        """Returns the stack with every tensor on a device; a tensor that is there already is shared."""
        return with_tensors(self, lambda tensor: tensor.to(device))


def stack(rollouts: Sequence[Rollout]) -> RolloutStack:
    """Stacks rollouts that are alike; see `Rollout.stack`."""
    if not rollouts:
        raise InvalidRequestError("rollouts must hold at least one rollout, got none; pass a group.", field="rollouts")
    first = rollouts[0]

    def common(name: str, value_of: Callable[[Rollout], Any]) -> Any:
        values = [value_of(rollout) for rollout in rollouts]
        for index, value in enumerate(values):
            if value != values[0]:
                raise InvalidRequestError(
                    f"rollouts must be alike in {name} to be stacked, got {values[0]} and at index {index} {value}; "
                    "stack those apart.",
                    field="rollouts",
                )
        return values[0]

    def stacked(name: str, value_of: Callable[[Rollout], Any]) -> Tensor | None:
        kind = common(f"the shape of {name}", lambda rollout: _kind(value_of(rollout)))
        is_tensor = isinstance(value_of(first), Tensor)
        return torch.stack([value_of(rollout) for rollout in rollouts]) if kind is not None and is_tensor else None

    sigmas = common("sigmas", lambda rollout: rollout.sampling.sigmas)
    timesteps = common("timesteps", lambda rollout: rollout.sampling.timesteps)
    trajectory = first.dit_trajectory
    states = common("latent_step_indices", lambda rollout: getattr(rollout.dit_trajectory, "latent_step_indices", None))
    return RolloutStack(
        prompts=tuple(rollout.prompt for rollout in rollouts),
        seeds=tuple(rollout.seed for rollout in rollouts),
        weight_versions=tuple(rollout.weight_version for rollout in rollouts),
        images=stacked("image", lambda rollout: rollout.image),
        log_probs=stacked("log_probs", lambda rollout: rollout.log_probs),
        sde_step_indices=common("sde_step_indices", lambda rollout: rollout.sde_step_indices),
        latents=None if trajectory is None else stacked("latents", lambda rollout: rollout.dit_trajectory.latents),  # type: ignore[union-attr]
        latent_step_indices=states,
        timesteps=torch.tensor(timesteps, dtype=torch.float32),
        sigmas=torch.tensor(sigmas, dtype=torch.float32),
    )


def at_steps(rollout: Rollout, wanted: Steps) -> Rollout:
    """Returns the rollout with the tensors of some steps alone; see `Rollout.__getitem__`."""
    from flowroll.types.results import StepImages, StepTensors

    steps = _resolve(wanted, rollout.sampling.num_inference_steps)
    states = _states_of(rollout, steps)
    changes: dict[str, Any] = {"debug_tensors": None, "step_tensors": None, "step_images": None}
    if (trajectory := rollout.dit_trajectory) is not None:
        rows = [row for row, state in enumerate(trajectory.latent_step_indices) if state in states]
        kept = tuple(trajectory.latent_step_indices[row] for row in rows)
        changes["dit_trajectory"] = replace(trajectory, latents=trajectory.latents[rows], latent_step_indices=kept)
    tables = list(_step_tables(rollout))
    if common := [step for step in steps if tables and all(step in held for held, _ in tables)]:
        fields = {name: tensor[[held.index(step) for step in common]] for held, part in tables for name, tensor in part.items()}
        changes["step_tensors"] = StepTensors(step_indices=tuple(common), tensors=fields)
    if (images := rollout.step_images) is not None and (shown := [step for step in images.step_indices if step in steps]):
        pictures = tuple(images.images[images.step_indices.index(step)] for step in shown)
        changes["step_images"] = StepImages(step_indices=tuple(shown), images=pictures)
    return replace(rollout, **changes)


def _step_tables(rollout: Rollout) -> Iterable[tuple[list[int], dict[str, Tensor]]]:
    """Yields what there is of single steps: the steps, and by field a row for each."""
    if (debug := rollout.debug_tensors) is not None:
        held = list(range(len(debug.noise_std_dev)))
        yield held, {field: getattr(debug, name) for name, field in _FIELD_OF_DEBUG.items()}
    if (chosen := rollout.step_tensors) is not None:
        yield list(chosen.step_indices), dict(chosen.tensors)


def _states_of(rollout: Rollout, steps: Sequence[int]) -> set[int]:
    """Returns the states from which these steps are replayed: before and after each, and one earlier for a multistep solver."""
    record = rollout.sampling
    names = {record.sde_type, *(rule.dynamics for rule in record.steps or ())}
    before = -1 if any(dynamics_named(name).needs_history for name in names) else 0
    return {step + offset for step in steps for offset in range(before, 2)}


def _resolve(wanted: Steps, num_steps: int) -> list[int]:
    """Returns steps in ascending order, each once; negative ones count from the end, as in a list."""
    if isinstance(wanted, slice):
        steps = list(range(num_steps)[wanted])
    else:
        given = [wanted] if isinstance(wanted, int) else list(wanted)
        for step in given:
            if not -num_steps <= step < num_steps:
                raise InvalidRequestError(
                    f"steps must lie in 0..{num_steps - 1}, got {step}; count steps from 0.", field="steps"
                )
        steps = [step % num_steps for step in given]
    if not steps:
        raise InvalidRequestError(
            f"steps must hold at least one of the {num_steps} steps, got none; use rollout[first:last + 1].", field="steps"
        )
    return sorted(set(steps))


def _kind(value: object) -> object:
    return (str(value.dtype), tuple(value.shape)) if isinstance(value, Tensor) else None if value is None else "PNG"
