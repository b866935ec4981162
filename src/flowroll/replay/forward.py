"""The policy's velocity at latents of the caller's own making: for methods that noise clean latents themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.families import Transformer
from flowroll.replay.precision import noticed_autocast
from flowroll.replay.sources import check_autocast, check_noticed_autocast, check_weights, place_of, source_of
from flowroll.types import Rollout


def velocities(
    transformer: Transformer,
    rollout: Rollout,
    latents: Sequence[Float[Tensor, " *latent"]],
    *,
    steps: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    autocast: str = "refuse",
) -> list[Float[Tensor, " *latent"]]:
    """Returns the guided velocity at each of these latents, under a rollout's environment and at its steps' noise levels.

    Args:
        transformer: The policy: any callable with the diffusers class's signature (plain, FSDP-wrapped, with LoRA).
        rollout: A rollout with env; of its trajectory nothing but the noise levels is used.
        latents: x at the sigma of the step beside it, e.g. (1 - sigma) x0 + sigma eps of clean latents x0.
        steps: The step whose sigma, and timestep, each of the latents is at.
        device: The device of the transformer; None: that of its first weight.
        dtype: The dtype of its inputs; None: as the rollout records, which must be the dtype that the weights have in the
            forward: their own, or that of FSDP's mixed precision.
        autocast: "refuse": a call under `torch.autocast` is an error. "measure": it runs; there is no ratio to measure here.

    Returns:
        v = eps - x0, float32, differentiable in the transformer's weights.

    Raises:
        InvalidRequestError: The rollout has no env, or latents and steps do not fit it.
    """
    check_weights(transformer)
    place = place_of(transformer, [rollout], device, dtype, autocast)
    source = source_of(0, rollout, place)
    if len(latents) != len(steps) or not all(0 <= step < source.num_steps for step in steps):
        raise InvalidRequestError(
            f"steps must name one of the {source.num_steps} steps for each of the {len(latents)} latents, got {list(steps)}; "
            "count them from 0.",
            field="steps",
        )
    check_autocast(place)
    recipe, env = source.recipe, source.env_on(place)
    fixed = recipe.fixed_inputs(env)
    with noticed_autocast(transformer, place.device) as dtypes:
        # Copied, because what the caller cut out of a decoded message may lie anywhere, and bits can depend on that.
        found = [
            recipe.velocity(transformer, one.to(place.device, copy=True), step, env, fixed).to(torch.float32)
            for one, step in zip(latents, steps, strict=True)
        ]
    check_noticed_autocast(place, dtypes)
    return found
