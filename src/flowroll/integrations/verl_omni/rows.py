"""Rows of verl-omni's batches as rollouts again, which `flowroll.replay` takes.

It needs neither verl nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.types import Rollout
from flowroll.wire.files import DAMAGE, outline, unflatten

# The fields of a row that hold the tensors of an environment, by their names in one.
_EMBEDS = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_hidden_states_mask": "prompt_embeds_mask",
    "pooled_projections": "pooled_prompt_embeds",
}


def rollout_of(row: Mapping[str, Any]) -> Rollout:
    """Makes the rollout from which a row of a batch, or a `DiffusionOutput`, was made, bit for bit, without its picture's form.

    `flowroll.replay.log_prob(transformer, [rollout_of(row)], steps=...)` then has the recorded log-probs, exactly, while the
    weights are those that made it.

    Args:
        row: The fields of one sample without batch dimension: `flowroll_rollout`, `all_latents`, `prompt_embeds`,
            `prompt_embeds_mask`, those of the negative prompt if there was one, the pooled ones of a model that has them, and
            `rollout_log_probs` (in a `DiffusionOutput`: `log_probs`). Padding is taken off where the masks say so.

    Raises:
        InvalidRequestError: A field is missing, or `flowroll_rollout` is not what flowroll wrote.
    """
    text = _field(row, "flowroll_rollout")
    try:
        sample = outline(text)
        record, start = sample.sampling, int(_field(row, "flowroll_window_start"))

        def load(name: str) -> Tensor:
            part, _, field = name.rpartition(".")
            if name == "dit_trajectory.sigmas":
                return torch.tensor(record.sigmas, dtype=torch.float32)
            if name == "dit_trajectory.timesteps":
                return torch.tensor(record.timesteps, dtype=torch.float32)
            if name == "dit_trajectory.latents":
                return _states(row)
            if name.endswith("log_probs"):
                return _log_probs(row, start, record.num_inference_steps)
            if field in _EMBEDS:
                return _embedding(row, "negative_" if "neg" in part else "", field, record.model_dtype)
            # The picture, which nothing is computed from.
            return torch.zeros((3, 1, record.height, record.width), dtype=torch.uint8)

        return unflatten(text, load)
    except DAMAGE as error:
        if isinstance(error, KeyError):
            raise
        raise InvalidRequestError(
            f"flowroll_rollout must be the text that flowroll wrote, got {str(text)[:80]!r} ({error}); keep it as it came.",
            field="flowroll_rollout",
        ) from error


def _states(row: Mapping[str, Any]) -> Tensor:
    latents: Tensor = _field(row, "all_latents")
    clean = row.get("latents_clean")
    return latents if clean is None else torch.cat([latents, clean[None]])


def _log_probs(row: Mapping[str, Any], start: int, num_steps: int) -> Tensor:
    given: Tensor = _field(row, "rollout_log_probs", "log_probs")
    whole = torch.zeros(num_steps)
    whole[start : start + len(given)] = given
    return whole


def _embedding(row: Mapping[str, Any], prefix: str, field: str, dtype: str) -> Tensor:
    value: Tensor = _field(row, prefix + _EMBEDS[field])
    if field == "pooled_projections":
        return value.to(getattr(torch, dtype.removeprefix("torch.")))
    kept = _field(row, f"{prefix}prompt_embeds_mask").bool()
    return (
        value[kept] if field == "encoder_hidden_states_mask" else value[kept].to(getattr(torch, dtype.removeprefix("torch.")))
    )


def _field(row: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if (value := row.get(name)) is not None:
            return value
    raise InvalidRequestError(
        f"{names[0]} must be in the row, got {', '.join(sorted(map(str, row)))[:200]}; roll out with calculate_log_probs=True "
        "and keep the fields of the rollout.",
        field=names[0],
    )
