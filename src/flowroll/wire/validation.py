"""From bytes to a checked request, and from whatever can be wrong to one error that says what, why and what to do.

Owns the wording of refused values. The rules themselves stand with the fields.
"""

from __future__ import annotations

import inspect
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, UnsetType, convert

from flowroll.errors import InvalidRequestError, MalformedRequestError, PayloadTooLargeError
from flowroll.types import ALIASES, ROLLOUT_FIELDS
from flowroll.types.arguments import closest
from flowroll.wire.fields import Request
from flowroll.wire.names import EXTRA, ROLLOUT_ROUTE

RequestT = TypeVar("RequestT", bound=Request)

# msgspec prints an integer that is none of a literal's, and Python does not print several thousand digits.
_REFUSED = (msgspec.ValidationError, ValueError)
_MAX_NAME_CHARS = 80
# From this size on a value of a body is data, bytes in msgpack and base64 in JSON, or holds some: a tensor or an image, alone
# or among others.
_MAX_PLAIN_VALUE = 64 * 1024
_MAX_TENSOR_DEPTH = 3
_BIN_TYPES, _LONG_TEXT = (0xC4, 0xC5, 0xC6), 0xDB
_RAW_OBJECT, _RAW_LIST = dict[str, msgspec.Raw], list[msgspec.Raw]
# A list or an object that holds data has few parts.
_MAX_PARTS = 64
_ROLLOUT_NAMES = ROLLOUT_FIELDS | set(ALIASES)
_NAMES: Mapping[Any, str] = {NoneType: "null", None: "null", str: "a string", int: "an integer", float: "a number"}


def parse_json_body(body: bytes | bytearray, *, max_plain_bytes: int | None = None) -> dict[str, Any]:
    """Returns the JSON object in a request body; NaN, infinities and numbers out of range are no JSON.

    Args:
        body: All of it.
        max_plain_bytes: The most bytes of everything but data in base64, since other values take far more memory than bytes;
            None: the body itself is no longer than that.

    Raises:
        MalformedRequestError: It holds anything else.
        PayloadTooLargeError: It is larger.
    """
    try:
        is_small = max_plain_bytes is None or len(body) <= max_plain_bytes
        parsed = msgspec.json.decode(body) if is_small else _json_with_data(body, max_plain_bytes or 0)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"body must be JSON in UTF-8, got {error}; send one JSON object.") from error
    except RecursionError as error:
        raise MalformedRequestError("body must be JSON, got too many nested levels; send one flat JSON object.") from error
    if not isinstance(parsed, dict):
        raise MalformedRequestError(f"body must be a JSON object, got {shown(parsed)}; send the request's fields by name.")
    return parsed


def _json_with_data(body: bytes | bytearray, max_plain_bytes: int) -> Any:
    left = max_plain_bytes

    def too_large() -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"the body must have at most {max_plain_bytes} bytes beside those of tensors and images, got more; send a smaller "
            "request."
        )

    def value(raw: msgspec.Raw, depth: int, *, may_be_data: bool = False) -> Any:
        nonlocal left
        start = bytes(memoryview(raw)[:1])
        if len(raw) > _MAX_PLAIN_VALUE and start == b'"' and may_be_data:
            return msgspec.json.decode(raw, type=str)
        # There is no comma in base64.
        if len(raw) > _MAX_PLAIN_VALUE and depth < _MAX_TENSOR_DEPTH and bytes(raw).count(b",") < _MAX_PARTS:
            if start == b"{":
                parts = msgspec.json.decode(raw, type=_RAW_OBJECT)
                # Of a tensor; any other long text is a prompt.
                return {name: value(item, depth + 1, may_be_data=name == "data") for name, item in parts.items()}
            if start == b"[":
                return [value(item, depth + 1, may_be_data=True) for item in msgspec.json.decode(raw, type=_RAW_LIST)]
        left -= len(raw)
        if left < 0:
            raise too_large()
        return msgspec.json.decode(raw)

    # Each part of the object takes far more memory than a comma.
    if body.count(b",") > max_plain_bytes // 8:
        raise too_large()
    if body.lstrip()[:1] != b"{":
        return None
    return {name: value(item, 0) for name, item in msgspec.json.decode(body, type=_RAW_OBJECT).items()}


def parse_msgpack_body(body: bytes | bytearray, *, max_plain_bytes: int) -> dict[str, Any]:
    """Returns the object in a request body in msgpack, in which nothing but the bytes of tensors and images may be large.

    Args:
        body: All of it; what is large in the result refers to it.
        max_plain_bytes: The most bytes of everything but those of tensors and images, since other values take far more memory
            than bytes.

    Raises:
        MalformedRequestError: It holds anything else.
    """
    left = max_plain_bytes

    def value(raw: msgspec.Raw, depth: int) -> Any:
        nonlocal left
        if len(raw) > _MAX_PLAIN_VALUE and memoryview(raw)[0] in _BIN_TYPES:
            return msgspec.msgpack.decode(raw, type=memoryview)
        if len(raw) > _MAX_PLAIN_VALUE and memoryview(raw)[0] == _LONG_TEXT:
            return msgspec.msgpack.decode(raw, type=str)
        if len(raw) > _MAX_PLAIN_VALUE and depth < _MAX_TENSOR_DEPTH:
            if (parts := _length_of_list(raw)) is None:
                return {name: value(item, depth + 1) for name, item in msgspec.msgpack.decode(raw, type=_RAW_OBJECT).items()}
            if parts < _MAX_PARTS:
                return [value(item, depth + 1) for item in msgspec.msgpack.decode(raw, type=_RAW_LIST)]
        left -= len(raw)
        if left < 0:
            raise MalformedRequestError(
                f"body must hold at most {max_plain_bytes} bytes beside those of tensors and images, got more; send a smaller "
                "request."
            )
        return msgspec.msgpack.decode(raw)

    try:
        return {name: value(item, 0) for name, item in msgspec.msgpack.decode(body, type=_RAW_OBJECT).items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(
            f"body must be msgpack, got {error}; send one object with tensors as its values."
        ) from error
    except RecursionError as error:
        raise MalformedRequestError("body must be msgpack, got too many nested levels; send one flat object.") from error


def _length_of_list(raw: msgspec.Raw) -> int | None:
    """Returns how many items a list in msgpack says that it has; None for any other value."""
    head = bytes(memoryview(raw)[:5])
    if head[0] & 0xF0 == 0x90:
        return head[0] & 0x0F
    size = {0xDC: 2, 0xDD: 4}.get(head[0])
    return None if size is None else int.from_bytes(head[1 : 1 + size], "big")


def parse(kind: type[RequestT], data: object) -> RequestT:
    """Returns the request that `data` holds, each value checked against its own rule, and those between fields.

    Rules of `SamplingParams` are checked by the request's `to_params`.

    Args:
        kind: A request.
        data: What `parse_json_body` gave.

    Raises:
        InvalidRequestError: Names the field as the wire has it, the rule, the value and the remedy.
    """
    if not isinstance(data, dict):
        raise InvalidRequestError(
            f"body must be a JSON object of valid text, got {shown(data)}; send the request's fields by name."
        )
    # Before any value: a misspelt field is often a missing one as well.
    _check_names(kind, data)
    try:
        request = convert(data, kind)
    except _REFUSED as error:
        raise _first_wrong(kind, data) from error
    request.check(data)
    return request


def _check_names(kind: type[Request], data: dict[Any, Any]) -> None:
    for field in kind.__struct_fields__:
        inner, value = nested_request(kind, field), data.get(field)
        if inner is not None and isinstance(value, dict):
            for name in value:
                if name not in inner.__struct_fields__:
                    raise _unknown_field(kind, (field, str(name)), value[name])
    for name in data:
        if name not in kind.__struct_fields__:
            raise _unknown_field(kind, (str(name),), data[name])


def _first_wrong(kind: type[Request], data: dict[str, Any], parent: str = "") -> InvalidRequestError:
    """Returns the error of the first field whose value breaks its rule."""
    for name, field in _fields(kind).items():
        wrong, value = "nothing", data.get(name)
        if name in data:
            try:
                convert(value, field.type)
                continue
            except _REFUSED as error:
                inner = nested_request(kind, name)
                if inner is not None and isinstance(value, dict):
                    return _first_wrong(inner, value, f"{name}.")
                wrong = shown(_item_at(value, str(error)))
        elif not field.required:
            continue
        remedy, rule = _about(field.type)
        return InvalidRequestError(f"{parent}{name} must {rule}, got {wrong}; {remedy}.", field=parent + name)
    raise AssertionError(f"nothing is wrong in a refused {kind.__name__}")


def _item_at(value: Any, message: str) -> object:
    """Returns the part of a value that msgspec's message is about, which does not name an object's value that is no string."""
    _, at, place = message.rpartition(" - at `$")
    for name, index in re.findall(r"\.([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]", place if at else ""):
        try:
            if name:
                value = value[name]
            elif index == "...":
                value = next((one for one in value.values() if not isinstance(one, str)), value)
            else:
                value = value[int(index)]
        except (AttributeError, LookupError, TypeError):
            # The message quotes a value that reads like a place.
            break
    return value


def shown(value: object) -> str:
    """Returns the value as an error message shows it: short, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = _MAX_NAME_CHARS
    try:
        return short.repr(value)
    except ValueError:
        # Python does not print integers of several thousand digits.
        return f"a huge {type(value).__name__}"


# Reading annotations takes far longer than a request.
@cache
def _fields(kind: type[Request]) -> Mapping[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(kind)}


@cache
def nested_request(kind: type[Request], field: str) -> type[Request] | None:
    """Returns the class of a field that is an object of fields."""
    hint = _fields(kind)[field].type if field in kind.__struct_fields__ else None
    parts = get_args(getattr(hint, "__origin__", hint))
    return next((part for part in parts if inspect.isclass(part) and issubclass(part, Request)), None)


def _about(hint: Any) -> tuple[str, str]:
    """Returns remedy and rule of a field."""
    said = hint.__metadata__[-1].extra
    return said["remedy"], said["rule"] or f"be {_listed(_words(hint), 'or')}"


def _words(hint: Any, limits: Sequence[Meta] = ()) -> list[str]:
    """Returns what a value may be, as its type and limits say it; alternatives one by one, null first."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(hint.__origin__, hint.__metadata__)
    if origin in (Union, UnionType):
        ordered = sorted(members, key=lambda member: member is not NoneType)
        return [word for member in ordered if member is not UnsetType for word in _words(member)]
    if origin is Literal:
        return [json.dumps(value) for value in members]
    if origin in (list, tuple):
        items = [re.sub(r"^an? (\w+)", r"\1s", word) for word in _words(members[0])]
        return [f"a list of {_listed(items, 'and')}"]
    if hint is bool:
        return ["true", "false"]
    return [_NAMES.get(hint, "an object") + _limits(hint, limits)]


def _limits(hint: Any, limits: Sequence[Meta]) -> str:
    least, most = (
        next((value for limit in limits for name in names if (value := getattr(limit, name)) is not None), None)
        for names in (("ge", "min_length"), ("le", "max_length"))
    )
    if hint is str:
        return (
            "" if most is None else f" of at most {most} characters" if least is None else f" of {least} to {most} characters"
        )
    if most is None:
        return "" if least is None else f" >= {least}"
    return f" from {least} to {most:g}" if hint is float else f" from {least} to {most}"


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join([part for part in (", ".join(words[:-1]), words[-1]) if part])


def _unknown_field(kind: type[Request], location: tuple[str, ...], value: object) -> InvalidRequestError:
    *path, last = (part[:_MAX_NAME_CHARS] for part in location)
    name = ".".join([*path, last])
    owner = kind if not path else nested_request(kind, path[0])
    assert owner is not None
    if last in _ROLLOUT_NAMES and not _ROLLOUT_NAMES & set(owner.__struct_fields__):
        message = f"{name} must be left out of plain generation, got {shown(value)}; use POST {ROLLOUT_ROUTE} for rollouts."
        return InvalidRequestError(message, field=name)
    return InvalidRequestError(f"{name} must be a known field, got an unknown name; {_remedy(kind, owner, last)}.", field=name)


def _remedy(kind: type[Request], owner: type[Request], name: str) -> str:
    known = owner.__struct_fields__
    if ALIASES.get(name) in known:
        return f"use {ALIASES[name]}"
    further = nested_request(kind, EXTRA)
    elsewhere = kind.__struct_fields__ if owner is not kind else () if further is None else further.__struct_fields__
    if name in elsewhere:
        return "send it at the top level" if owner is not kind else f"send it inside {EXTRA}"
    guess = closest(name, known)
    # Every field once, though some have a short name too.
    fields = [field for field in known if field not in ALIASES]
    return f"use {guess} if that is meant" if guess else f"use one of {', '.join(fields)}"
