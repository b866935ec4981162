"""The OpenAPI document: the request models are shown in it although the routes read the raw body themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from flowroll.serving.middleware import OPEN_PATHS
from flowroll.serving.negotiation import PNG
from flowroll.wire.adapters import LoadAdapterRequest, UnloadAdapterRequest
from flowroll.wire.arrivals import BeginUpdateRequest, CheckUpdateRequest, CommitUpdateRequest, UpdateFromTensorRequest
from flowroll.wire.codec import MSGPACK
from flowroll.wire.control import AbortRequest, ContinueRequest, PauseRequest
from flowroll.wire.group import DestroyGroupRequest, InitGroupRequest, UpdateFromGroupRequest
from flowroll.wire.memory import ReleaseRequest, ResumeRequest
from flowroll.wire.responses import ScoreRequestObject
from flowroll.wire.schema import GenerateRequest, ImagesRequest, RolloutRequest
from flowroll.wire.weights import ChecksumRequest, UpdateFromDiskRequest, VerifyRequest

_REF = "#/components/schemas/{model}"
# The answers that are no JSON.
MSGPACK_CONTENT: dict[str, Any] = {
    MSGPACK: {"schema": {"type": "string", "format": "binary", "description": "The same; every `data` is raw bytes."}}
}
PNG_CONTENT: dict[str, Any] = {PNG: {"schema": {"type": "string", "format": "binary"}}}
_REQUESTS: tuple[type[BaseModel], ...] = (
    RolloutRequest,
    GenerateRequest,
    ImagesRequest,
    ScoreRequestObject,
    UpdateFromDiskRequest,
    ChecksumRequest,
    VerifyRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    ReleaseRequest,
    ResumeRequest,
    BeginUpdateRequest,
    CommitUpdateRequest,
    UpdateFromTensorRequest,
    CheckUpdateRequest,
    InitGroupRequest,
    UpdateFromGroupRequest,
    DestroyGroupRequest,
    AbortRequest,
    PauseRequest,
    ContinueRequest,
)


_SAFETENSORS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary", "description": "A safetensors file: tensors by their names."}
            }
        },
    }
}


def safetensors_body(query: type[BaseModel] | None = None) -> dict[str, Any]:
    """What a route that reads tensors, and fields of `query` beside them, adds to its entry in the document."""
    if query is None:
        return _SAFETENSORS_BODY
    described = query.model_json_schema()
    required = described.get("required", ())
    parameters = [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in described["properties"].items()
    ]
    return {**_SAFETENSORS_BODY, "parameters": parameters}


def request_body(model: type[BaseModel], **other_content: Any) -> dict[str, Any]:
    """What a route that reads `model`, or other content, adds to its entry in the document."""
    assert model in _REQUESTS
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}, **other_content}}}


def install_openapi(app: FastAPI, *, needs_token: bool) -> None:
    """Completes the app's document with the request models and the way to authenticate.

    Call it after the last route was added: the document is made here, once, because making it takes a tenth of a second.
    """
    document = app.openapi()
    components = document.setdefault("components", {})
    _, models = models_json_schema([(model, "validation") for model in _REQUESTS], ref_template=_REF)
    components.setdefault("schemas", {}).update(models["$defs"])
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in OPEN_PATHS:
            for operation in document["paths"][path].values():
                operation["security"] = []
