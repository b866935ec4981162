"""What callers may pass to an engine's methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flowroll.errors import InvalidRequestError
from flowroll.types import ALIASES, ROLLOUT_FIELDS, SamplingParams


def as_params(params: SamplingParams | None, values: dict[str, Any]) -> SamplingParams:
    """The request, given whole or by its fields.

    Raises:
        InvalidRequestError: Both were given, or a name is no field.
    """
    if params is not None:
        if values:
            raise InvalidRequestError("params must be given alone, got further fields; set them in SamplingParams.")
        return params
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(set(values) - known - set(ALIASES)):
        raise InvalidRequestError(
            f"{unknown[0]} must be a field of SamplingParams, got an unknown name; use one of {', '.join(sorted(known))}.",
            field=unknown[0],
        )
    if "prompt" not in values:
        raise InvalidRequestError("prompt must be given, got nothing; send one prompt as text.", field="prompt")
    return SamplingParams(**values)


def refuse_rollout_fields(values: Mapping[str, Any]) -> None:
    """Refuses fields that plain generation does not have."""
    if given := sorted(name for name in values if ALIASES.get(name, name) in ROLLOUT_FIELDS):
        raise InvalidRequestError(
            f"{given[0]} must be left out of plain generation, got {values[given[0]]!r}; call rollout.", field=given[0]
        )


def refuse_rollout_params(params: SamplingParams) -> None:
    """Refuses a request whose rollout fields are not at their defaults."""
    blank = SamplingParams(prompt="", rollout=False)
    refuse_rollout_fields(
        {name: getattr(params, name) for name in ROLLOUT_FIELDS if getattr(params, name) != getattr(blank, name)}
    )
