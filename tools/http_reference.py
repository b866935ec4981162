"""Writes the HTTP reference as Markdown, from the OpenAPI document that the app makes.

The document is that of a server of a small checkpoint; it is the same for every model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flowroll.checkpoints import shapes_checkpoint
from flowroll.engine import Engine
from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.serving import ServerConfig, create_app

Node = Mapping[str, Any]


def document() -> dict[str, Any]:
    """Returns the OpenAPI document of a server that demands a token, so that it shows that too."""
    checkpoint = str(shapes_checkpoint("z_image"))
    with Engine(checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service:
        app = create_app(InProcessEngine(service), ServerConfig(model=checkpoint, api_key="key"))
    found: dict[str, Any] = app.openapi()
    return found


def http_reference(of: Node | None = None) -> str:
    """Returns the reference: routes by tag, headers, then the objects that they read and answer."""
    whole = document() if of is None else of
    return "\n".join([*_routes(whole), *_headers(whole), *_objects(whole)])


def _routes(whole: Node) -> Iterator[str]:
    for tag in whole["tags"]:
        title = {"openai": "OpenAI"}.get(tag["name"], tag["name"].capitalize())
        yield from (f"## {title}", "", tag["description"], "")
        for path, operations in whole["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    yield from _route(whole, f"{method.upper()} {path}", operation)


def _route(whole: Node, name: str, operation: Node) -> Iterator[str]:
    is_open = operation.get("security") == []
    yield from (f"### `{name}`", "", _sentence(operation["summary"], operation.get("description")), "")
    if is_open:
        yield from ("It needs no token.", "")
    parameters = [_resolved(whole, parameter) for parameter in operation.get("parameters", ())]
    if parameters:
        yield from ("| parameter | in | type | meaning |", "|---|---|---|---|")
        for parameter in parameters:
            schema = parameter["schema"]
            text = parameter.get("description") or schema.get("description", "")
            yield f"| `{parameter['name']}` | {parameter['in']} | {_kind(schema)} | {_cell(text)} |"
        yield ""
    if "requestBody" in operation:
        yield from (f"**Body**: {_content(operation['requestBody']['content'])}", "")
    yield from ("| status | answer | |", "|---|---|---|")
    for status, response in operation["responses"].items():
        yield f"| {status} | {_content(response.get('content', {}))} | {_cell(response['description'])} |"
    yield ""


def _headers(whole: Node) -> Iterator[str]:
    yield from ("## Headers", "", "Those that a request may carry:", "", "| header | meaning |", "|---|---|")
    for parameter in whole["components"]["parameters"].values():
        yield f"| `{parameter['name']}` | {_cell(parameter['description'])} |"
    yield from ("", "Those that an answer has:", "", "| header | on | meaning |", "|---|---|---|")
    found: dict[str, tuple[set[str], Node]] = {}
    num_operations = 0
    for operations in whole["paths"].values():
        for operation in operations.values():
            num_operations += 1
            for status, response in operation["responses"].items():
                for name, header in response.get("headers", {}).items():
                    found.setdefault(name, (set(), _resolved(whole, header)))[0].add(status)
    for name, (statuses, header) in found.items():
        where = "every answer" if len(statuses) > 5 else ", ".join(sorted(statuses))
        yield f"| `{name}` | {where} | {_cell(header['description'])} |"
    yield ""


def _objects(whole: Node) -> Iterator[str]:
    yield from ("## Objects", "")
    for name, schema in whole["components"]["schemas"].items():
        yield from (f"### {name}", "")
        if text := schema.get("description"):
            yield from (_cell(text), "")
        if properties := schema.get("properties"):
            required = schema.get("required", ())
            yield from ("| field | type | default | meaning |", "|---|---|---|---|")
            for field, value in properties.items():
                default = "required" if field in required else _default(value)
                yield f"| `{field}` | {_kind(value)} | {default} | {_cell(value.get('description', ''))} |"
            yield ""


def _resolved(whole: Node, node: Node) -> Node:
    if "$ref" not in node:
        return node
    found: Node = whole
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found


def _content(content: Node) -> str:
    shown = [f"{_kind(described.get('schema', {}))} as `{media_type}`" for media_type, described in content.items()]
    return " or ".join(shown)


def _kind(schema: Node) -> str:
    """Returns a schema's type in words."""
    if schema.get("format") == "binary":
        return "bytes"
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return " or ".join(dict.fromkeys(_kind(one) for one in schema[choice]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    kind = schema.get("type", "any")
    kinds = kind if isinstance(kind, list) else [kind]
    limits = [f"{sign} {schema[key]:g}" for key, sign in _LIMITS.items() if isinstance(schema.get(key), int | float)]
    return " or ".join(kinds) + (f" {', '.join(limits)}" if limits else "")


_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _default(schema: Node) -> str:
    if "default" not in schema:
        return ""
    value = schema["default"]
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _sentence(summary: str, description: str | None) -> str:
    return f"{summary}. {description or ''}".strip()


def _cell(text: str) -> str:
    """Returns a text as it can stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
