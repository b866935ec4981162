"""Two rollouts, tensor by tensor. Pure functions; they know nothing of processes or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from flowroll.parity.results import Measure, TensorParity
from flowroll.types import DenoisingEnv, EnvValue, Rollout


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value of a rollout.

    Attributes:
        value: A tensor, or plain data.
        first: How many of its leading rows are the first step's: 1, or 2 for states; None for a value without steps.
    """

    value: object
    first: int | None = None


def compare_rollouts(expected: Sequence[Rollout], actual: Sequence[Rollout]) -> tuple[TensorParity, ...]:
    """Every tensor that a rollout returns, and its record, over all samples of a request.

    Args:
        expected: Of one rank, one per sample.
        actual: Of the layout, in the same order.
    """
    assert len(expected) == len(actual) and expected
    pairs = [(entries_of(left), entries_of(right)) for left, right in zip(expected, actual, strict=True)]
    names = list(dict.fromkeys(name for left, right in pairs for name in (*left, *right)))
    return tuple(_compare_entry(name, pairs) for name in names)


def entries_of(rollout: Rollout) -> dict[str, _Entry]:
    """What of a rollout is compared, by name: every tensor, the env whole, and how the sample was made."""
    entries = {"image": _Entry(rollout.image)}
    if rollout.log_probs is not None:
        entries["log_prob"] = _Entry(rollout.log_probs, 1)
    if rollout.debug_tensors is not None:
        for field in fields(rollout.debug_tensors):
            entries[field.name] = _Entry(getattr(rollout.debug_tensors, field.name), 1)
    if (trajectory := rollout.dit_trajectory) is not None:
        # The first step takes state 0 and makes state 1.
        entries["latents"] = _Entry(trajectory.latents, 2)
        entries["timesteps"] = _Entry(trajectory.timesteps, 1)
        entries["sigmas"] = _Entry(trajectory.sigmas, 2)
        entries["latent_step_indices"] = _Entry(trajectory.latent_step_indices)
    if rollout.denoising_env is not None:
        entries |= _env_entries(rollout.denoising_env)
    entries["record"] = _Entry((rollout.seed, rollout.sde_step_indices, rollout.sampling))
    return entries


def _env_entries(env: DenoisingEnv) -> dict[str, _Entry]:
    branches: dict[str, Mapping[str, EnvValue] | None] = {
        "positive": env.pos_cond_kwargs,
        "negative": env.neg_cond_kwargs,
        "image": env.image_kwargs,
    }
    entries = {
        f"env.{branch}.{key}": _Entry(value) for branch, values in branches.items() for key, value in (values or {}).items()
    }
    if env.guidance is not None:
        entries["env.guidance"] = _Entry(env.guidance)
    return entries


def _compare_entry(name: str, pairs: list[tuple[dict[str, _Entry], dict[str, _Entry]]]) -> TensorParity:
    firsts, wholes = [], []
    for left, right in pairs:
        if name not in left or name not in right:
            note = "missing" if name in left else "not there on one rank"
            wholes.append(Measure(equal=False, max_abs=None, mean_abs=None, min_cosine=None, note=note))
            continue
        expected, actual, first = left[name].value, right[name].value, left[name].first
        wholes.append(measure(expected, actual, first=first))
        if first is not None and isinstance(expected, Tensor) and isinstance(actual, Tensor):
            firsts.append(measure(expected[:first], actual[:first], first=first))
    return TensorParity(name=name, first=combine(firsts) if firsts else None, whole=combine(wholes))


def measure(expected: object, actual: object, *, first: int | None = None) -> Measure:
    """How far a value is from what it should be. Differences are computed in float64.

    Args:
        expected: A tensor [...], or with `first` [steps, ...] or [states, ...]; or plain data.
        actual: The same, of the layout.
        first: How many leading rows are the first step's; None for a value without steps.
    """
    left, right = _numbers(expected), _numbers(actual)
    if left is None or right is None:
        return Measure(equal=bool(expected == actual), max_abs=None, mean_abs=None, min_cosine=None)
    if left.shape != right.shape:
        note = f"shape {list(right.shape)} instead of {list(left.shape)}"
        return Measure(equal=False, max_abs=None, mean_abs=None, min_cosine=None, note=note)
    note = "" if left.dtype == right.dtype else f"{right.dtype} instead of {left.dtype}".replace("torch.", "")
    if torch.equal(left, right):
        return Measure(equal=not note, note=note)
    wide_left, wide_right = left.to(torch.float64), right.to(torch.float64)
    differences = (wide_left - wide_right).abs()
    return Measure(
        equal=False,
        max_abs=differences.max().item(),
        mean_abs=differences.mean().item(),
        min_cosine=_min_cosine(wide_left, wide_right, has_steps=first is not None),
        first_step=None if first is None else _first_unequal(left, right, first),
        note=note,
    )


def combine(measures: Sequence[Measure]) -> Measure:
    """One measure over several samples: the worst of each figure, and the mean of the means."""
    steps = [each.first_step for each in measures if each.first_step is not None]
    return Measure(
        equal=all(each.equal for each in measures),
        max_abs=_over(torch.max, [each.max_abs for each in measures]),
        mean_abs=_over(torch.mean, [each.mean_abs for each in measures]),
        min_cosine=_over(torch.min, [each.min_cosine for each in measures]),
        first_step=min(steps, default=None),
        note="; ".join(dict.fromkeys(each.note for each in measures if each.note)),
    )


def _over(reduce: Callable[[Tensor], Tensor], values: list[float | None]) -> float | None:
    """A reduction by torch, where a NaN wins (Python's `max` may lose it); None if one value is not there."""
    known = [value for value in values if value is not None]
    return float(reduce(torch.tensor(known, dtype=torch.float64))) if len(known) == len(values) else None


def _numbers(value: object) -> Tensor | None:
    """The value as a tensor; None for what has no numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(value) if isinstance(value, (bool, int, float, list, tuple)) else None
    except (ValueError, TypeError, RuntimeError):  # ragged, or with other things inside
        return None


def _min_cosine(expected: Float[Tensor, " ..."], actual: Float[Tensor, " ..."], *, has_steps: bool) -> float:
    # One number a step has no direction of its own: there the steps together are the vector.
    by_step = has_steps and expected[:1].numel() > 1
    rows = expected.shape[0] if by_step else 1
    left, right = expected.reshape(rows, -1), actual.reshape(rows, -1)
    norms = left.norm(dim=1) * right.norm(dim=1)
    # Two zero vectors are the same; a zero vector and another one have nothing in common.
    both_zero = (left == 0).all(dim=1) & (right == 0).all(dim=1)
    cosines = torch.where(norms == 0, both_zero.to(torch.float64), (left * right).sum(dim=1) / norms)
    return cosines.clamp(-1.0, 1.0).min().item()


def _first_unequal(expected: Shaped[Tensor, "rows ..."], actual: Shaped[Tensor, "rows ..."], first: int) -> int | None:
    """The step that made the first row that differs: state k + 1 is made by step k."""
    unequal = (row for row in range(expected.shape[0]) if not torch.equal(expected[row], actual[row]))
    row = next(unequal, None)
    return None if row is None else max(0, row - (first - 1))
