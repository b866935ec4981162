"""Bodies of forms (multipart/form-data), as OpenAI's clients send files: read in memory, with nothing written to the disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from flowroll.errors import InvalidRequestError, MalformedRequestError
from flowroll.wire.fields import Request

FORM: Final = "multipart/form-data"
# Far above what a request has.
_MOST_PARTS = 256
# How clients write that a name has several values: `image[]` or `image[0]`.
_LIST_NAME = re.compile(r"(.*?)\[[0-9]{0,3}\]", re.DOTALL)
_SEND = "send one part for each field, and one for each file"


@dataclass(slots=True, kw_only=True)
class _Part:
    """One part of a form.

    Attributes:
        name: The name of its field.
        is_file: Whether it has the name of a file.
        data: Its bytes.
    """

    name: str
    is_file: bool
    data: bytearray


class _Parts:
    """Collects the parts of a form.

    Attributes:
        found: The parts in their order.
        is_whole: Whether the form has come to its end.
    """

    def __init__(self) -> None:
        self.found: list[_Part] = []
        self.is_whole = False
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""

    @property
    def callbacks(self) -> Any:
        """What the parser calls, by its names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": lambda data, start, end: self.found[-1].data.extend(memoryview(data)[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name")
        if name is None:
            raise MalformedRequestError(f"body must name each of its parts, got one without a name; {_SEND}.")
        if len(self.found) >= _MOST_PARTS:
            raise MalformedRequestError(f"body must have at most {_MOST_PARTS} parts, got more; {_SEND}.")
        self.found.append(_Part(name=name.decode("utf-8", "replace"), is_file=b"filename" in options, data=bytearray()))

    def _end(self) -> None:
        self.is_whole = True


def parse_form_body(body: bytes | bytearray, content_type: str, kind: type[Request], files: str) -> dict[str, Any]:
    """Returns the fields of a form as a request has them: files as bytes, numbers and booleans from their text.

    Args:
        body: All of it.
        content_type: The header, which has the boundary between parts.
        kind: The request, whose types say what a text stands for.
        files: The field that holds files.

    Raises:
        MalformedRequestError: The body is no such form.
        InvalidRequestError: A field that is no list is given several times.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedRequestError(f"content-type must name the boundary of {FORM}, got none; {_SEND}.", field="content-type")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks)
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequestError(f"body must be {FORM}, got {str(error)[:200]}; {_SEND}.") from error
    if not parts.is_whole:
        raise MalformedRequestError(f"body must be {FORM}, got one that ends early; {_SEND}.")
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    found: dict[str, Any] = {}
    for part in parts.found:
        name, listed = part.name, _LIST_NAME.fullmatch(part.name)
        if files == (listed[1] if listed else name):
            found.setdefault(files, []).append(bytes(part.data))
        elif name in found:
            raise InvalidRequestError(f"{name[:80]} must be given once, got it twice; remove one of the two.", field=name[:80])
        else:
            found[name] = bytes(part.data) if part.is_file else _value(part.data, name, types)
    return found


def _value(value: bytearray, name: str, types: Mapping[str, Any]) -> Any:
    """Returns what the text of a field stands for; the text itself where it stands for nothing else."""
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequestError(f"{name[:80]} must be text in UTF-8, got other bytes; {_SEND}.") from error
    if name not in types:
        return text
    try:
        return msgspec.to_builtins(msgspec.convert(text, types[name], strict=False))
    except msgspec.ValidationError:
        # Refused by its own rule later, as what it looks like.
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return text
