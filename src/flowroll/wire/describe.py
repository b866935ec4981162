"""JSON schemas of the messages, for the OpenAPI document: types and limits from the annotations, words from the docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any, get_origin

import msgspec

from flowroll.wire.fields import Request

REF = "#/components/schemas/{name}"
_SECTION = re.compile(r"\n\n(?=\w+:\n)")
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n     +.*)*)", re.MULTILINE)


def components(kinds: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The schemas of messages and of all that is in them, by name.

    Args:
        kinds: Structs and dataclasses.
    """
    kinds = list(kinds)
    _, found = msgspec.json.schema_components(kinds, ref_template=REF)
    classes = {kind.__name__: kind for kind in (get_origin(kind) or kind for kind in kinds)}
    for schema in found.values():
        # Of a generic class "Name[Leaf]".
        kind = classes.get(schema["title"].partition("[")[0])
        _describe(schema, [schema.get("description", "")] if kind is None else [base.__doc__ or "" for base in kind.__mro__])
        if kind is not None and issubclass(kind, Request) and kind.EXAMPLES:
            schema["examples"] = list(kind.EXAMPLES)
    return found


def _describe(schema: dict[str, Any], docs: list[str]) -> None:
    """Adds what the docstrings of a class and its bases say: of the class itself, and of its fields."""
    schema["description"] = _parts(docs[0])[0]
    # There is nothing else in a message, in either direction.
    schema.setdefault("additionalProperties", False)
    for doc in docs:
        attributes = _parts(doc)[1]
        for name, field in schema["properties"].items():
            if name in attributes:
                field.setdefault("description", attributes[name])


def _parts(doc: str) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its sections, and its attributes; as JSON has the values that it names."""
    text = inspect.cleandoc(doc)
    for python, json in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", json, text)
    head, *sections = _SECTION.split(text)
    listed = next((section for section in sections if section.startswith("Attributes:\n")), "")
    return head, {name: " ".join(words.split()) for name, words in _ATTRIBUTE.findall(listed)}
