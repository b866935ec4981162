"""The OpenAPI document: what the routes read and answer, from the very types that do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from fastapi import FastAPI
from fastapi.routing import APIRoute

from flowroll.serving.middleware import OPEN_PATHS
from flowroll.serving.negotiation import PNG
from flowroll.wire.codec import JSON, MSGPACK
from flowroll.wire.describe import REF, components
from flowroll.wire.fields import Request
from flowroll.wire.messages import (
    SentEnv,
    WireEnv,
    WireImage,
    WireSample,
    WireSampleScores,
    WireScoreAnswer,
    WireScoreRequest,
    WireStepImages,
    WireSteps,
    WireStepTensors,
    WireTensor,
    WireTrajectory,
)
from flowroll.wire.schema import ExtraGenerateParams, ExtraSamplingParams

# The contents that are no JSON.
MSGPACK_CONTENT: dict[str, Any] = {
    MSGPACK: {"schema": {"type": "string", "format": "binary", "description": "The same; every `data` is raw bytes."}}
}
PNG_CONTENT: dict[str, Any] = {PNG: {"schema": {"type": "string", "format": "binary"}}}
_SAFETENSORS = {"type": "string", "format": "binary", "description": "A safetensors file: tensors by their names."}
_Tensor = WireTensor[str]


def safetensors_body(query: type[Request] | None = None) -> dict[str, Any]:
    """Returns what a route that reads tensors, and fields of `query` beside them, adds to its entry in the document."""
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _SAFETENSORS}}}}
    if query is None:
        return body
    described = components([query])[query.__name__]
    required = described.get("required", ())
    fields = described["properties"].items()
    return body | {
        "parameters": [{"name": name, "in": "query", "required": name in required, "schema": field} for name, field in fields]
    }


def request_body(kind: type, media_type: str = JSON, /, **other_content: Any) -> dict[str, Any]:
    """Returns what a route that reads a message, or other content, adds to its entry in the document."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": _ref(kind)}, **other_content}}}


def tensor_answer(kind: type, description: str, *, is_list: bool = False, **other_content: Any) -> dict[str, Any]:
    """Returns what a route that answers a message with tensors, or a list of them, says of it in the document."""
    schema = {"type": "array", "items": _ref(kind)} if is_list else _ref(kind)
    return {"description": description, "content": {JSON: {"schema": schema}, **MSGPACK_CONTENT, **other_content}}


def install_openapi(app: FastAPI, *, needs_token: bool) -> None:
    """Completes the app's document with the messages and the way to authenticate.

    Call it after the last route was added: the document is made here, once, because making it takes a tenth of a second.
    """
    document = app.openapi()
    described = document.setdefault("components", {}).setdefault("schemas", {})
    requests = [kind for kind in _all_below(Request) if kind.EXAMPLES]
    described |= components([*requests, ExtraSamplingParams, ExtraGenerateParams, *dict.fromkeys(_answers(app))])
    described |= components(kind[_Tensor] for kind in (WireScoreRequest, WireSteps, SentEnv))
    of_steps = (WireTrajectory, WireStepTensors, WireStepImages)
    tensors = (WireSample, WireEnv, *of_steps, WireImage, WireScoreAnswer, WireSampleScores)
    described |= components((kind[_Tensor] for kind in tensors), is_answer=True)
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in OPEN_PATHS:
            for operation in document["paths"][path].values():
                operation["security"] = []


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": REF.format(name=kind.__name__)}


def _all_below(kind: type[Request]) -> Iterator[type[Request]]:
    for below in kind.__subclasses__():
        yield below
        yield from _all_below(below)


def _answers(app: FastAPI) -> Iterator[Any]:
    """Returns the dataclasses that the routes answer, of which the web framework knows no words."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            for model in (route.response_model, *(response.get("model") for response in route.responses.values())):
                yield from (kind for kind in get_args(model) or (model,) if dataclasses.is_dataclass(kind))
