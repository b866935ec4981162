"""Turns the arguments of an engine's `rollout` and `generate` into requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowroll.engine.plan import RequestPlan
from flowroll.errors import InvalidRequestError
from flowroll.types import ALIASES, ROLLOUT_FIELDS, SamplingParams, params_of


def rollout_request(
    request: str | SamplingParams | RequestPlan | None, values: Mapping[str, Any]
) -> SamplingParams | RequestPlan:
    """Returns the request of a rollout from the arguments of `Engine.rollout`.

    Raises:
        InvalidRequestError: The prompt is given twice or not at all, a name is no field, or a value is invalid.
    """
    if isinstance(request, RequestPlan):
        return params_of(request.params, values) if values else request
    return params_of(request, values)


def image_request(
    request: str | SamplingParams | RequestPlan | None, values: Mapping[str, Any]
) -> SamplingParams | RequestPlan:
    """Returns the request of plain generation from the arguments of `Engine.generate`.

    Raises:
        InvalidRequestError: As for `rollout_request`, or a rollout field is given.
    """
    _refuse_rollout_fields(values)
    if request is None or isinstance(request, str):
        return params_of(request, {**values, "rollout": False})
    found = rollout_request(request, values)
    _refuse_rollout_params(found.params if isinstance(found, RequestPlan) else found)
    return found


def _refuse_rollout_fields(values: Mapping[str, Any]) -> None:
    if given := sorted(name for name in values if ALIASES.get(name, name) in ROLLOUT_FIELDS):
        raise InvalidRequestError(
            f"{given[0]} must be left out of plain generation, got {values[given[0]]!r}; call rollout.", field=given[0]
        )


def _refuse_rollout_params(params: SamplingParams) -> None:
    """Refuses a request whose rollout fields are not at their defaults."""
    blank = SamplingParams(prompt="", rollout=False)
    _refuse_rollout_fields(
        {name: getattr(params, name) for name in ROLLOUT_FIELDS if getattr(params, name) != getattr(blank, name)}
    )
