"""Two answers to one request, tensor by tensor. Pure functions that know nothing of processes or files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flowroll.types import Number, Rollout

# What a rollout says about its run rather than about the sample; what a sample was drawn from is compared.
_OF_THE_RUN = (
    *("request_id", "weight_version", "inference_time_s", "peak_memory_mb", "first_step", "last_step", "left_out"),
    *(f"provenance.{name}" for name in ("layout", "strategy", "versions", "weights_sha256")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How far a value is from the one that it should be.

    Attributes:
        equal: The same shape, dtype and bits (`torch.equal`).
        max_abs: Largest absolute difference; NaN where one of the two has a NaN. None where there are no figures.
        mean_abs: Mean absolute difference.
        min_cosine: Smallest cosine over samples and steps; where a step has one number, the cosine over all steps.
        first_step: The first step that is not equal; None where all are, or where the value has no steps.
        note: What the figures cannot say.
    """

    equal: bool
    max_abs: Number | None = 0.0
    mean_abs: Number | None = 0.0
    min_cosine: Number | None = 1.0
    first_step: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParity:
    """One value of one mode, over all samples.

    Attributes:
        mode: The dynamics.
        name: E.g. "dit_trajectory.latents"; "sampling" is the record of how the sample was made.
        first: The difference at the first step; None for a value that has no steps.
        whole: The difference over all steps.
    """

    mode: str
    name: str
    first: Measure | None
    whole: Measure


def compare_rollouts(mode: str, expected: Sequence[Rollout], actual: Sequence[Rollout]) -> tuple[TensorParity, ...]:
    """Compares every tensor that a rollout returns, and its record, over all samples of a request.

    Args:
        mode: The dynamics.
        expected: One rank's rollouts, one per sample.
        actual: The layout's, in the same order.
    """
    assert len(expected) == len(actual) and expected
    num_steps = expected[0].sampling.num_inference_steps
    left, right = ([dict(values_of(rollout)) for rollout in rollouts] for rollouts in (expected, actual))
    names = dict.fromkeys(name for values in (*left, *right) for name in values)
    found = []
    for name in names:
        ours, theirs = [values.get(name) for values in left], [values.get(name) for values in right]
        steps = _step_rows(name, ours[0], num_steps)
        first = (
            None
            if steps is None
            else measure([_rows(value, steps) for value in ours], [_rows(value, steps) for value in theirs])
        )
        found.append(TensorParity(mode=mode, name=name, first=first, whole=measure(ours, theirs, first_rows=steps)))
    return tuple(found)


def values_of(rollout: Rollout) -> Iterator[tuple[str, object]]:
    """Returns everything that a rollout says about its sample, by dotted name; what is absent is left out."""
    for field in fields(rollout):
        yield from (leaf for leaf in _leaves(field.name, getattr(rollout, field.name)) if not leaf[0].startswith(_OF_THE_RUN))


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif is_dataclass(value) and name != "sampling":
        for field in fields(value):
            yield from _leaves(f"{name}.{field.name}", getattr(value, field.name))
    elif value is not None:
        yield name, value


def _step_rows(name: str, value: object, num_steps: int) -> int | None:
    """Returns how many rows of a value the first step has: 1, or 2 of states; None for a value without steps."""
    if not isinstance(value, Tensor) or not name.startswith(("log_probs", "debug_tensors.", "dit_trajectory.")):
        return None
    return len(value) - num_steps + 1


def _rows(value: object, rows: int) -> object:
    return value[:rows] if isinstance(value, Tensor) else value


def measure(expected: Sequence[object], actual: Sequence[object], *, first_rows: int | None = None) -> Measure:
    """Returns how far the samples' values are from what they should be. Differences are computed in float64.

    Args:
        expected: One value per sample: a tensor [...], with `first_rows` [steps, ...] or [states, ...]; or plain data.
        actual: The layout's values; None where it has none.
        first_rows: How many leading rows the first step has; None for values without steps.
    """
    pairs = list(zip(expected, actual, strict=True))
    note = "; ".join(dict.fromkeys(filter(None, (_note(left, right) for left, right in pairs))))
    comparable = [(left, right) for left, right in pairs if isinstance(left, Tensor) and isinstance(right, Tensor)]
    if len(comparable) < len(pairs) or any(left.shape != right.shape for left, right in comparable):
        same = not note and all(left == right for left, right in pairs if not isinstance(left, Tensor))
        return Measure(equal=same, max_abs=None, mean_abs=None, min_cosine=None, note=note)
    left, right = (torch.stack(list(tensors)) for tensors in zip(*comparable, strict=True))
    if torch.equal(left, right):
        return Measure(equal=not note, note=note)
    differences = (left.double() - right.double()).abs()
    return Measure(
        equal=False,
        max_abs=differences.max().item(),
        mean_abs=differences.mean().item(),
        min_cosine=_min_cosine(left.double(), right.double(), has_steps=first_rows is not None),
        first_step=None if first_rows is None else _first_unequal(left, right, first_rows),
        note=note,
    )


def _note(expected: object, actual: object) -> str:
    if expected is None or actual is None:
        return "missing" if actual is None else "not there on one rank"
    if not (isinstance(expected, Tensor) and isinstance(actual, Tensor)):
        return ""
    if expected.shape != actual.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    return "" if expected.dtype == actual.dtype else f"{actual.dtype} instead of {expected.dtype}".replace("torch.", "")


def _min_cosine(expected: Float[Tensor, "samples ..."], actual: Float[Tensor, "samples ..."], *, has_steps: bool) -> float:
    # One number a step has no direction of its own: there the steps together are the vector.
    by_step = has_steps and expected[0, :1].numel() > 1
    left, right = (tensor.flatten(0, 1).flatten(1) if by_step else tensor.flatten(1) for tensor in (expected, actual))
    # Two zero vectors are the same; a zero vector and another one have nothing in common.
    cosines = cosine_similarity(left, right, dim=1, eps=0.0).nan_to_num(0.0).where(~(left == right).all(dim=1), 1.0)
    return cosines.clamp(-1.0, 1.0).min().item() if (left + right).isfinite().all() else math.nan


def _first_unequal(
    expected: Shaped[Tensor, "samples rows ..."], actual: Shaped[Tensor, "samples rows ..."], first_rows: int
) -> int:
    """Returns the step that made the first row that differs: state k + 1 is made by step k."""
    unequal = (row for row in range(expected.shape[1]) if not torch.equal(expected[:, row], actual[:, row]))
    return max(0, next(unequal) - (first_rows - 1))
