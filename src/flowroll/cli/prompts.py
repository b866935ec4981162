"""Reads files of prompts, for `rollout` and `bench serve`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.types import ALIASES, SamplingParams, by_field_name, params_of
from flowroll.types.arguments import refuse_unknown


def read_requests(path: Path, flags: Mapping[str, Any]) -> list[SamplingParams]:
    """Reads the requests of a file; blank lines are skipped.

    A line is a prompt, or in a .jsonl file an object of fields of `SamplingParams`, in which `images` and `latents` are paths
    from the folder of this file on. The text is UTF-8, with or without a byte order mark. A line ends at a line feed, alone or
    after a carriage return; whatever else separates lines is part of a prompt.

    Args:
        path: The file.
        flags: Fields of every request; the fields of a line take precedence over them.

    Raises:
        InvalidRequestError: A line is no such object, a field is unknown or breaks its rule, or there is no prompt at all.
    """
    # A mistake in the flags is not blamed on a line.
    SamplingParams(**{"prompt": "", **flags})
    found = []
    for where, fields in _lines(path):
        try:
            own = _with_files(fields, path.parent)
            found.append(params_of(None, {**_flags_beside(flags, own), **own}))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{where} is refused: {error.message}", field="prompts") from error
    return found


def _flags_beside(flags: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags whose value no field gives, under either name."""
    refuse_unknown(fields)
    given = by_field_name(fields)
    return {name: value for name, value in flags.items() if ALIASES.get(name, name) not in given}


def _with_files(fields: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Returns the fields of a line with the bytes of its images, and its latents, in place of their paths."""
    if isinstance(latents := fields.get("latents"), str):
        fields = {**fields, "latents": read_latents(folder / latents)}
    paths = fields.get("images")
    if not isinstance(paths, list):
        return fields
    files = []
    for index, name in enumerate(paths):
        try:
            files.append((folder / name).read_bytes())
        except (OSError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"images[{index}] must be the path of a file, got {str(name)[:80]!r} ({error}); correct it.", field="images"
            ) from error
    return {**fields, "images": files}


def read_latents(path: Path) -> Tensor:
    """Reads the latents that samples start from.

    Args:
        path: A safetensors file with one tensor, named `latents`.

    Raises:
        InvalidRequestError: It is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise InvalidRequestError(
            f"latents must name a safetensors file, got {str(path)!r} ({error}); correct the path, or save it again.",
            field="latents",
        ) from error
    if set(found) != {"latents"}:
        shown = ", ".join(sorted(found))[:80] or "none"
        raise InvalidRequestError(
            f"latents must name a file with one tensor, latents, got {shown}; save that one alone.", field="latents"
        )
    return found["latents"]


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a file, for a command that chooses all other fields.

    Raises:
        InvalidRequestError: The file is refused as by `read_requests`, or a line gives a field other than the prompt.
    """
    prompts = []
    for where, fields in _lines(path):
        if others := sorted(fields.keys() - {"prompt"}):
            raise InvalidRequestError(
                f"{where} must hold a prompt alone for this command, got {others[0]}; give it as a flag.", field="prompts"
            )
        prompts.append(fields["prompt"])
    return prompts


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns every line that is not blank: its name in messages (file and line number), and its fields."""
    try:
        # Newlines stay as they are.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} must be UTF-8 text, got other bytes; save it as UTF-8.", field="prompts") from error
    lines = [(f"{path}, line {number},", line.strip(" \t\r")) for number, line in enumerate(text.split("\n"), start=1)]
    is_json = path.suffix.lower() == ".jsonl"
    found = [(where, _fields(where, line) if is_json else {"prompt": line}) for where, line in lines if line]
    if not found:
        raise InvalidRequestError(f"{path} must hold at least one prompt, got none; write one a line.", field="prompts")
    return found


def _fields(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where} must be JSON, got {error}; write one object a line.", field="prompts") from error
    if not isinstance(value, dict) or not (isinstance(value.get("prompt"), str) or "prompt_token_ids" in value):
        shown = line if len(line) <= 80 else line[:77] + "..."
        raise InvalidRequestError(f'{where} must hold a text under "prompt", got {shown}; add one.', field="prompts")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object of these members; refuses a name that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found
