"""JSON schemas of the messages for the OpenAPI document: types and limits from annotations, texts from docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any, get_origin

import msgspec

REF = "#/components/schemas/{name}"
_SECTION = re.compile(r"\n\n(?=\w+:\n)")
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n     +.*)*)", re.MULTILINE)
_WORDS = (("None", "null"), ("True", "true"), ("False", "false"))


def components(kinds: Iterable[Any], *, is_answer: bool = False) -> dict[str, dict[str, Any]]:
    """Returns the schemas of messages, and of everything in them, by name.

    Args:
        kinds: The classes of the messages, which are structs and dataclasses.
        is_answer: Whether every field is always present, even one that has a default for a reader.
    """
    kinds = list(kinds)
    _, found = msgspec.json.schema_components(kinds, ref_template=REF)
    text = msgspec.json.encode(found)
    for key, schema in found.items():
        # The leaves of a generic message are those of JSON: "WireSample[WireTensor[str]]".
        text = text.replace(f'{key}"'.encode(), f'{schema["title"].partition("[")[0]}"'.encode())
    named: dict[str, dict[str, Any]] = msgspec.json.decode(text)
    classes: dict[str, type] = {kind.__name__: kind for kind in (get_origin(kind) or kind for kind in kinds)}
    for name, schema in named.items():
        kind = classes.get(name)
        docs = [schema["description"]] if kind is None else [base.__doc__ or "" for base in kind.__mro__]
        _describe(schema, docs)
        # A message has no other fields, in either direction.
        schema |= {"title": name, "additionalProperties": False}
        if examples := getattr(kind, "EXAMPLES", ()):
            schema["examples"] = list(examples)
        if is_answer and kind is not None:
            schema["required"] = list(schema["properties"])
    return named


def _describe(schema: dict[str, Any], docs: list[str]) -> None:
    """Adds the descriptions of a class and of its fields from the docstrings of the class and its bases."""
    schema["description"] = _parts(docs[0])[0]
    for doc in docs:
        attributes = _parts(doc)[1]
        for name, field in schema["properties"].items():
            if name in attributes:
                field.setdefault("description", attributes[name])


def _parts(doc: str) -> tuple[str, dict[str, str]]:
    """Returns a docstring's text before its sections, and its attributes, with Python's None and booleans as in JSON."""
    text = inspect.cleandoc(doc)
    for python, json in _WORDS:
        text = re.sub(rf"\b{python}\b", json, text)
    head, *sections = _SECTION.split(text)
    listed = next((section for section in sections if section.startswith("Attributes:\n")), "")
    return head, {name: " ".join(words.split()) for name, words in _ATTRIBUTE.findall(listed)}
