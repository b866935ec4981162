"""Derives one command-line flag per field of `SamplingParams`, and one per short name, from the dataclass and its docstring.

A flag that is not set does not exist: it never enters `SamplingParams`, whose own defaults decide, and which refuses a value
that is given by both of its names.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from torch import Tensor

from flowroll.cli.prompts import read_latents
from flowroll.errors import InvalidRequestError
from flowroll.sampling.dynamics import DYNAMICS, noise_level_help
from flowroll.sampling.transition import LogProbForm
from flowroll.types import ALIASES, Number, SamplingParams, StepOptions
from flowroll.types.forks import Fork
from flowroll.types.prompts import ALL_PROMPT_TENSORS

_GIVEN = "given"
# Tensors do not fit on a command line. Of latents it takes a file; a prompt's embeddings are several that go together.
_NO_FLAG = frozenset(ALL_PROMPT_TENSORS)


def with_sampling_flags(
    command: Callable[..., None], *, without: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[..., None]:
    """Gives a command the sampling flags; those that were set reach it as the argument `given`, by field or short name.

    Args:
        command: A command whose parameter `given: dict[str, Any]` takes the flags.
        without: Fields for which this command has no flag, under either name.
        defaults: Values that this command has where a flag is not set, for the help; the others are those of `SamplingParams`.
    """
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != _GIVEN
    ]
    wanted = {field.name: field for field in fields(SamplingParams) if field.name not in {*without, *_NO_FLAG}}
    shown = {**{name: field.default for name, field in wanted.items()}, **(defaults or {})}
    flags = [_flag(name, field, shown[name]) for name, field in wanted.items()]
    flags += [_flag(alias, wanted[name], shown[name]) for alias, name in ALIASES.items() if name in wanted]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        # No files are an empty list.
        unset = [name for name, value in given.items() if value is None or (isinstance(value, list) and not value)]
        command(**values, given={name: value for name, value in given.items() if name not in unset})

    parameters = [*own, *flags]
    # typer reads both.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flag(name: str, field: Field[Any], shown: object) -> inspect.Parameter:
    """Makes the typer parameter of one field or short name: required if the field is, otherwise None until it is set.

    Args:
        name: The field's or the short name.
        field: The field.
        shown: Its default, for the help; what None means, the help text says.
    """
    kind, options = _flag_type(get_type_hints(SamplingParams)[field.name])
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    option = typer.Option(
        *names,
        help=_field_help().get(field.name, ""),
        show_default=_default_text(name, shown) or False,
        # Short names work, but the help shows each value once.
        hidden=name in ALIASES,
        **options,
    )
    is_required = field.default is MISSING
    annotation: Any = Annotated[kind if is_required else kind | None, option]
    default = inspect.Parameter.empty if is_required else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default_text(name: str, value: object) -> str:
    """Writes a default as it would be given: the name of the switch, or the value."""
    if isinstance(value, bool):
        return name.replace("_", "-") if value else "no-" + name.replace("_", "-")
    return "" if value is None or value is MISSING else str(value)


def _flag_type(hint: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what typer parses for a field's type, and the options that this takes."""
    if get_origin(hint) in (Union, types.UnionType):
        members = tuple(member for member in get_args(hint) if member is not type(None))
        if members == get_args(Number):
            return float, {}
        if members == get_args(Fork | Mapping[int, int]):
            return str, {"parser": _json_object, "metavar": "JSON"}
        if members == (int, tuple[int, ...]):
            return str, {"parser": _one_or_several, "metavar": "N or N,N,..."}
        assert len(members) == 1, f"no flag for {hint}"
        return _flag_type(members[0])
    if hint == tuple[bytes, ...]:
        return list[str], {"parser": read_file, "metavar": "FILE"}
    if hint is Tensor:
        return str, {"parser": _latents_in, "metavar": "FILE"}
    if get_origin(hint) is tuple and (get_args(hint)[0] is StepOptions or get_origin(get_args(hint)[0]) is tuple):
        return str, {"parser": _json_list, "metavar": "JSON"}
    if hint is LogProbForm:
        return str, {"parser": _json_object, "metavar": "JSON"}
    if get_origin(hint) is tuple:
        item, _ = _flag_type(get_args(hint)[0])
        if get_origin(item) is Literal:
            return str, {"parser": _comma_list(str), "metavar": "NAME,NAME,..."}
        # typer would take several words for a tuple type; the parser makes one of a single word.
        return str, {"parser": _comma_list(item), "metavar": "N,N,..."}
    assert hint in (bool, int, str) or get_origin(hint) is Literal, f"no flag for {hint}"
    return hint, {}


def read_file(path: str) -> bytes:
    """Returns the bytes of a file that a flag names."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"must name a file, got {path!r}: {error.strerror}; correct the path.") from error


def _latents_in(path: str) -> Tensor:
    try:
        return read_latents(Path(path))
    except InvalidRequestError as error:
        raise typer.BadParameter(error.message) from error


def _json(kind: type[Any], what: str, example: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, kind):
            raise typer.BadParameter(f"must be a JSON {what}, got {text!r}; write for example {example}.")
        return tuple(found) if kind is list else found

    return parse


_json_list = _json(list, "list", """'[{"noise_level": 0.8}, {"dynamics": "ode"}]'""")
_json_object = _json(dict, "object", """'{"reduce": "sum"}', or '{"2": 4}' for a fork""")


def _comma_list(item: type[int] | type[float] | type[str]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(item(part) for part in text.split(",")) if text.strip() else ()
        except ValueError as error:
            kind = "integers" if item is int else "numbers"
            raise typer.BadParameter(f"must be {kind} separated by commas, got {text!r}; write 0,1,2.") from error

    return parse


def _one_or_several(text: str) -> int | tuple[int, ...]:
    numbers: tuple[int, ...] = _comma_list(int)(text)
    return numbers[0] if len(numbers) == 1 else numbers


@functools.cache
def _field_help() -> dict[str, str]:
    """Collects the description of each field from the docstring that defines it and from the dynamics."""
    section = (inspect.getdoc(SamplingParams) or "").partition("Attributes:\n")[2].split("\n\n")[0]
    found = {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.M)}
    shorts = {field: "--" + alias.replace("_", "-") for alias, field in ALIASES.items()}
    found["images"] += " The flag names a file, and may be given several times."
    dynamics = {
        "rollout_sde_type": "; ".join(f"{name}: {entry.summary}" for name, entry in DYNAMICS.items()) + ".",
        "rollout_noise_level": f"The limits are {noise_level_help()}.",
    }
    for field, short in shorts.items():
        found[field] = " ".join(filter(None, (found[field], dynamics.get(field), f"In short: {short}.")))
    return found
