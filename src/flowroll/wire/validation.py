"""From bytes to a checked request, and from whatever can be wrong to one error that says what, why and what to do.

Owns the wording of refused values. The rules themselves stand with the fields.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_args

import msgspec
from pydantic import BaseModel, ValidationError

from flowroll.errors import InvalidRequestError, MalformedRequestError
from flowroll.types import ROLLOUT_FIELDS
from flowroll.types.arguments import closest
from flowroll.wire.fields import Rule
from flowroll.wire.names import EXTRA, PARAM_TO_WIRE, ROLLOUT_ROUTE

ModelT = TypeVar("ModelT", bound=BaseModel)

_MAX_NAME_CHARS = 80
_BODY_RULE = Rule(text="be a JSON object of valid text", remedy="send the request's fields by name")
_ROLLOUT_NAMES = ROLLOUT_FIELDS | set(PARAM_TO_WIRE.values())


def parse_json_body(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in a request body; NaN, infinities and numbers out of range are no JSON.

    Raises:
        MalformedRequestError: It holds anything else.
    """
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"body must be JSON in UTF-8, got {error}; send one JSON object.") from error
    except RecursionError as error:
        raise MalformedRequestError("body must be JSON, got too many nested levels; send one flat JSON object.") from error
    if not isinstance(parsed, dict):
        raise MalformedRequestError(f"body must be a JSON object, got {shown(parsed)}; send the request's fields by name.")
    return parsed


def parse(model: type[ModelT], data: object) -> ModelT:
    """The request that `data` holds, each value checked against its own rule.

    Rules between values are checked by the request's `to_params`.

    Args:
        model: One of the request models of `flowroll.wire.schema`.
        data: What `parse_json_body` gave.

    Raises:
        InvalidRequestError: Names the field as the wire has it, the rule, the value and the remedy.
    """
    if isinstance(data, dict):
        _check_names(model, data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _error_from_validation(model, error) from error


def _check_names(model: type[BaseModel], data: dict[Any, Any]) -> None:
    """Refuses an unknown name before any value is looked at.

    A misspelt field is often a missing one as well. And pydantic would make an error of each name, of a million as of one.
    """
    for field in model.model_fields:
        inner, value = nested_model(model, field), data.get(field)
        if inner is not None and isinstance(value, dict):
            for name in value:
                if name not in inner.model_fields:
                    raise _unknown_field(model, (field, str(name)), value[name])
    for name in data:
        if name not in model.model_fields:
            raise _unknown_field(model, (str(name),), data[name])


def _error_from_validation(model: type[BaseModel], error: ValidationError) -> InvalidRequestError:
    """One error for all that pydantic found wrong: the first bad value."""
    detail = error.errors(include_url=False, include_context=False)[0]
    location = tuple(detail["loc"])
    value = "nothing" if detail["type"] == "missing" else shown(detail["input"])
    name, rule = _rule_at(model, location)
    return InvalidRequestError(f"{name} must {rule.text}, got {value}; {rule.remedy}.", field=name if location else None)


def shown(value: object) -> str:
    """The value as an error message shows it: short, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = _MAX_NAME_CHARS
    try:
        return short.repr(value)
    except ValueError:
        # Python does not print integers of several thousand digits.
        return f"a huge {type(value).__name__}"


def nested_model(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model of a field that is an object."""
    info = model.model_fields.get(field)
    candidates = () if info is None else (info.annotation, *get_args(info.annotation))
    return next((kind for kind in candidates if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _rule_at(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, Rule]:
    """Name and rule of the field at pydantic's location; a place in a list counts as the list's field."""
    if not location:
        return "body", _BODY_RULE
    name = cast(str, location[0])
    inner = nested_model(model, name)
    if inner is not None and len(location) > 1:
        nested, rule = _rule_at(inner, location[1:])
        return f"{name}.{nested}", rule
    return name, next(entry for entry in model.model_fields[name].metadata if isinstance(entry, Rule))


def _unknown_field(model: type[BaseModel], location: tuple[str, ...], value: object) -> InvalidRequestError:
    *path, last = (part[:_MAX_NAME_CHARS] for part in location)
    name = ".".join([*path, last])
    owner = model if not path else nested_model(model, path[0])
    assert owner is not None
    if last in _ROLLOUT_NAMES and not _ROLLOUT_NAMES & set(owner.model_fields):
        message = f"{name} must be left out of plain generation, got {shown(value)}; use POST {ROLLOUT_ROUTE} for rollouts."
        return InvalidRequestError(message, field=name)
    return InvalidRequestError(f"{name} must be a known field, got an unknown name; {_remedy(model, owner, last)}.", field=name)


def _remedy(model: type[BaseModel], owner: type[BaseModel], name: str) -> str:
    if PARAM_TO_WIRE.get(name) in owner.model_fields:
        return f"use {PARAM_TO_WIRE[name]}"
    extra = nested_model(model, EXTRA)
    elsewhere: Mapping[str, object] = model.model_fields if owner is not model else extra.model_fields if extra else {}
    if name in elsewhere:
        return "send it at the top level" if owner is not model else f"send it inside {EXTRA}"
    known = owner.model_fields
    guess = closest(name, known)
    return f"use {guess} if that is meant" if guess else f"use one of {', '.join(known)}"
