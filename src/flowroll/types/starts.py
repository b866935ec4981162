"""Where the samples of a request start, and what their noise is drawn from: the rules of the fields that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowroll.types.rules import is_int, require

if TYPE_CHECKING:
    from flowroll.types.params import SamplingParams

MAX_SEED = 2**32 - 1
# The fields that hold one value per sample where they hold a list.
PER_SAMPLE = ("seeds", "init_seed", "sde_seed")


def count_samples(asked: Mapping[str, Any]) -> int:
    """Returns the number of samples that a request asks for: the length of its lists, else `num_outputs_per_prompt`, else 1.

    Args:
        asked: The fields of a request by name.
    """
    lengths = [len(value) for name in PER_SAMPLE if isinstance(value := asked.get(name), tuple | list)]
    return lengths[0] if lengths else asked.get("num_outputs_per_prompt") or 1


def check_seeds(params: SamplingParams) -> None:
    """Checks the seeds of a request, and that its lists agree on the number of samples.

    Raises:
        InvalidRequestError: A value is no seed, or two fields contradict each other.
    """
    remedy = f"use an integer from 0 to {MAX_SEED}"
    if params.seeds is not None:
        require(params.seed is None, "seeds", "not be given together with seed", params.seeds, "send one of the two")
    for name in PER_SAMPLE:
        value = getattr(params, name)
        if isinstance(value, tuple):
            require(len(value) > 0, name, "hold at least one seed", value, "send one seed per output")
            for seed in value:
                require(_is_seed(seed), name, "hold integers in [0, 2^32)", seed, remedy)
            _check_count(params, name, len(value))
        elif value is not None:
            require(_is_seed(value), name, "be an integer in [0, 2^32), or one for each output", value, remedy)
    if params.seed is not None:
        last = params.seed + params.num_samples - 1 if is_int(params.seed) else params.seed
        require(is_int(params.seed) and params.seed >= 0, "seed", "be >= 0", params.seed, remedy)
        require(last <= MAX_SEED, "seed", "leave every seed + i below 2^32", params.seed, "use a smaller seed")


def _is_seed(value: object) -> bool:
    return is_int(value) and 0 <= value <= MAX_SEED  # type: ignore[operator]


def _check_count(params: SamplingParams, name: str, length: int) -> None:
    """Checks the length of one list against what the other fields say."""
    count = params.num_outputs_per_prompt
    require(
        count is None or count == length, name, f"hold num_outputs_per_prompt = {count} values", length, "send one per output"
    )
    for other in PER_SAMPLE[: PER_SAMPLE.index(name)]:
        value = getattr(params, other)
        if isinstance(value, tuple):
            require(len(value) == length, name, f"hold as many values as {other}, {len(value)}", length, "send one per output")


def check_start(params: SamplingParams) -> None:
    """Checks where a request starts and stops. The shape and dtype of `latents` are checked where the model is known.

    Raises:
        InvalidRequestError: `latents` is no tensor of floats, or two fields contradict each other.
    """
    latents, step = params.latents, params.start_step
    require(step is None or (is_int(step) and step >= 0), "start_step", "be an integer >= 0", step, "count steps from 0")
    stop = params.stop_step
    remedy = "leave it out to run to the end"
    require(stop is None or (is_int(stop) and stop >= 1), "stop_step", "be an integer >= 1", stop, remedy)
    if stop is not None and step is not None:
        require(stop > step, "stop_step", f"be above start_step = {step}", stop, "run at least one step")
    if latents is None:
        require(not step, "start_step", "be given with latents", step, "send the latents before that step")
        return
    is_tensor = isinstance(latents, Tensor) and latents.is_floating_point()
    require(is_tensor, "latents", "be a tensor of floats", type(latents).__name__, "send a state of a trajectory")
    given = params.init_seed
    require(given is None, "init_seed", "be left out beside latents", given, "no initial noise is drawn; remove one of the two")
