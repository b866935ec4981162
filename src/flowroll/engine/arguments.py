"""What callers may pass to an engine's methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowroll.engine.plan import RequestPlan
from flowroll.errors import InvalidRequestError
from flowroll.types import ROLLOUT_FIELDS, SamplingParams, params_of


def rollout_request(
    request: str | SamplingParams | RequestPlan | None, values: Mapping[str, Any]
) -> SamplingParams | RequestPlan:
    """The request of a rollout.

    Raises:
        InvalidRequestError: It is given twice or not at all, a name is no field, or a value breaks its rule.
    """
    if isinstance(request, RequestPlan):
        return params_of(request.params, values) if values else request
    return params_of(request, values)


def image_request(
    request: str | SamplingParams | RequestPlan | None, values: Mapping[str, Any]
) -> SamplingParams | RequestPlan:
    """The request of plain generation.

    Raises:
        InvalidRequestError: As for `rollout_request`; also for a rollout field.
    """
    _refuse_rollout_fields(values)
    if request is None or isinstance(request, str):
        return params_of(request, {**values, "rollout": False})
    found = rollout_request(request, values)
    _refuse_rollout_params(found.params if isinstance(found, RequestPlan) else found)
    return found


def _refuse_rollout_fields(values: Mapping[str, Any]) -> None:
    if given := sorted(ROLLOUT_FIELDS & set(values)):
        raise InvalidRequestError(
            f"{given[0]} must be left out of plain generation, got {values[given[0]]!r}; call rollout.", field=given[0]
        )


def _refuse_rollout_params(params: SamplingParams) -> None:
    """Refuses a request whose rollout fields are not at their defaults."""
    blank = SamplingParams(prompt="", rollout=False)
    _refuse_rollout_fields(
        {name: getattr(params, name) for name in ROLLOUT_FIELDS if getattr(params, name) != getattr(blank, name)}
    )
