"""The windows of stochastic steps, with the meaning that they have in verl-omni.

Reference: `sample_per_sample_sde_windows` in verl_omni/pipelines/request_batch.py, and the rollout pipelines of Flow-GRPO and
MixGRPO, verl-project/verl-omni at a1139baf.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping
from typing import Any

import torch

from flowroll.sampling.noise import step_seed
from flowroll.types.plain import plain
from flowroll.types.rules import is_int, require

# The range in which windows lie where the configuration says none.
_DEFAULT_RANGE = (0, 5)
# The draw of a window is keyed as that of a step is, by a number that no step has.
_DRAW = 2**32 - 1


def window_of(sampling: Mapping[str, Any], *, algorithm: str, num_steps: int, noise_seed: int) -> range:
    """Returns the stochastic steps of one sample.

    Without a size these are all steps but the last. With one, the window begins at a step that is drawn uniformly from those at
    which it still ends within the range. MixGRPO draws it once a training step, from `sde_window_seed + global_steps`, or moves
    it on by its size every `iters_per_group` training steps.

    Args:
        sampling: The sampling parameters of verl-omni.
        algorithm: The algorithm of the model's configuration, "flow_grpo" or "mix_grpo".
        num_steps: The number of denoising steps T.
        noise_seed: The sample's own seed, from which the window is drawn where nothing else decides.

    Returns:
        The steps, counted from 0; at least one.

    Raises:
        InvalidRequestError: The window does not fit the steps, or a value is no integer.
    """
    size = _number(sampling, "sde_window_size")
    if size is None:
        require(num_steps > 1, "num_inference_steps", "be above 1 without sde_window_size", num_steps, "take more steps")
        return range(num_steps - 1)
    low, high = _range(sampling)
    require(size >= 1, "sde_window_size", "be an integer >= 1", size, "leave it out for all steps but the last")
    fits = low >= 0 and low + size <= high <= num_steps
    rule = f"hold the {size} steps of a window among the {num_steps} steps"
    require(fits, "sde_window_range", rule, (low, high), "widen it, or make the window smaller")
    start = _start(sampling, algorithm, low, high - size, size, noise_seed)
    return range(start, start + size)


def _start(sampling: Mapping[str, Any], algorithm: str, first: int, last: int, size: int, noise_seed: int) -> int:
    if algorithm != "mix_grpo":
        return _drawn(first, last, noise_seed)
    strategy = sampling.get("sample_strategy") or "random"
    steps = _number(sampling, "global_steps") or 0
    if strategy == "progressive":
        each = max(1, _number(sampling, "iters_per_group") or 1)
        return min(first + max(0, steps) // each * size, last)
    require(strategy == "random", "sample_strategy", "be random or progressive", strategy, "choose one of these")
    seed = _number(sampling, "sde_window_seed")
    # Python's own generator, as in verl-omni, so that the window is that of every other rollout worker.
    return _drawn(first, last, noise_seed) if seed is None else random.Random(seed + steps).randint(first, last)


def _drawn(first: int, last: int, noise_seed: int) -> int:
    generator = torch.Generator().manual_seed(step_seed(noise_seed, _DRAW))
    return int(torch.randint(first, last + 1, (1,), generator=generator))


def _range(sampling: Mapping[str, Any]) -> tuple[int, int]:
    name = "sde_window_range"
    value = plain(_read(sampling.get(name)))
    if value is None:
        return _DEFAULT_RANGE
    ok = isinstance(value, tuple) and len(value) == 2 and all(map(is_int, value))
    require(ok, name, "hold two integers, the first step and the one after the last", value, "write e.g. [0,5]")
    low, high = value
    return low, high


def _number(sampling: Mapping[str, Any], name: str) -> int | None:
    value: int | None = plain(_read(sampling.get(name)))
    require(value is None or is_int(value), name, "be an integer", value, "send a whole number")
    return value


def _read(value: object) -> object:
    """Reads a value that a configuration holds as text, e.g. "[0,5]"."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value[:64])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
