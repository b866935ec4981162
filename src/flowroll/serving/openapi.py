"""The OpenAPI document: what the routes read and answer, from the very types that do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from fastapi import FastAPI
from fastapi.routing import APIRoute

from flowroll.logs import POLLED
from flowroll.serving.middleware import EXACTNESS_HEADER, OPEN_PATHS, REQUEST_ID_HEADER, TIMING_HEADER
from flowroll.serving.negotiation import DEADLINE_HEADER, DIALECT_HEADER, PNG
from flowroll.wire.codec import JSON, MSGPACK
from flowroll.wire.describe import REF, components
from flowroll.wire.fields import Request
from flowroll.wire.messages import (
    Dialect,
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
from flowroll.wire.names import ROLLOUT_ROUTE
from flowroll.wire.schema import ExtraGenerateParams, ExtraSamplingParams

# The contents that are no JSON.
MSGPACK_CONTENT: dict[str, Any] = {
    MSGPACK: {"schema": {"type": "string", "format": "binary", "description": "The same; every `data` is raw bytes."}}
}
PNG_CONTENT: dict[str, Any] = {PNG: {"schema": {"type": "string", "format": "binary"}}}
_SAFETENSORS = {"type": "string", "format": "binary", "description": "A safetensors file: tensors by their names."}
_Tensor = WireTensor[str]

DESCRIPTION = """Rollouts of flow-matching text-to-image models for RL post-training.

**Tensors** in an answer are objects: `shape`, `dtype`, and in `data` a safetensors file with the one key `t`. It is base64 text
in `application/json` and raw bytes in `application/msgpack`, which `Accept: application/msgpack` chooses.

**Errors** have a status and the body `{"error": {"code", "message", "field"}}`. The message names the field, the rule, the
value and what to do. A request is checked in full before any model work.
"""
TAGS: list[dict[str, str]] = [
    {"name": "rollout", "description": "Rollouts, and the log-probs of recorded steps under the present weights."},
    {"name": "images", "description": "Plain text-to-image, with the bits of the diffusers pipeline."},
    {"name": "openai", "description": "The routes that clients of OpenAI's image API call."},
    {"name": "weights", "description": "New weights, adapters, policies, checksums, and the memory of the weights."},
    {"name": "control", "description": "Aborting, pausing and continuing requests."},
    {
        "name": "health",
        "description": "Whether the process lives, takes requests and generates. All answer during a generation.",
    },
    {"name": "vllm", "description": "vLLM's routes for reinforcement learning: other names of what the routes above do."},
    {"name": "status", "description": "What is served, and Prometheus metrics."},
]
# An answer that only the routes have whose requests the engine works on.
_CANCELLED = "499"
_PARAMETERS: dict[str, dict[str, Any]] = {
    "Dialect": {
        "name": DIALECT_HEADER,
        "in": "header",
        "description": "The names that the answer uses. Left out: those of the server's --wire-dialect.",
        "schema": {"type": "string", "enum": list(get_args(Dialect))},
    },
    "Deadline": {
        "name": DEADLINE_HEADER,
        "in": "header",
        "description": "Seconds from the acceptance of the request after which it is given up with a 408. Left out: never.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
        "example": 120,
    },
    "Trace": {
        "name": "traceparent",
        "in": "header",
        "description": "The W3C trace context that the server's span of this request continues.",
        "schema": {"type": "string"},
        "example": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    },
}
_HEADERS: dict[str, dict[str, Any]] = {
    "RequestId": {
        "description": "The id of the request: its own `request_id`, or one that the server made. Every log line has it.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Timing": {
        "description": "Milliseconds by stage, such as `queue;dur=0.1, encode;dur=8.2, denoise;dur=95.0, decode;dur=4.1`.",
        "schema": {"type": "string"},
    },
    "Exactness": {
        "description": "`fast` in every answer of a server in the mode that is not exact; an exact one does not send it.",
        "schema": {"const": "fast"},
    },
    "RetryAfter": {
        "description": "Seconds after which the server expects to have room for this request.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "Challenge": {"description": "The scheme of the token.", "required": True, "schema": {"const": "Bearer"}},
}


def safetensors_body(query: type[Request] | None = None) -> dict[str, Any]:
    """Returns what a route that reads tensors, and fields of `query` beside them, adds to its entry in the document."""
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _SAFETENSORS}}}}
    return body if query is None else body | query_parameters(query)


def query_parameters(query: type[Request]) -> dict[str, Any]:
    """Returns what a route that reads the fields of `query` from its URL adds to its entry in the document."""
    described = components([query])[query.__name__]
    required = described.get("required", ())
    fields = described["properties"].items()
    return {
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
    _describe_headers(document)
    if needs_token:
        description = "The server's --api-key, as `Authorization: Bearer KEY`."
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "description": description}}
        document["security"] = [{"token": []}]
        for path in OPEN_PATHS & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []


def _describe_headers(document: dict[str, Any]) -> None:
    """Adds the headers that requests may carry, and those that each answer has."""
    document["components"] |= {"parameters": _PARAMETERS, "headers": _HEADERS}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_work = _CANCELLED in operation["responses"]
            found = {"Dialect": path == ROLLOUT_ROUTE, "Deadline": is_work, "Trace": path not in POLLED}
            taken = [name for name, is_taken in found.items() if is_taken]
            operation.setdefault("parameters", []).extend({"$ref": f"#/components/parameters/{name}"} for name in taken)
            for status, response in operation["responses"].items():
                names = {REQUEST_ID_HEADER: "RequestId", EXACTNESS_HEADER: "Exactness"}
                if status == "200" and is_work:
                    names[TIMING_HEADER] = "Timing"
                if status == "429":
                    names["Retry-After"] = "RetryAfter"
                if status == "401":
                    names["WWW-Authenticate"] = "Challenge"
                shown = {header: {"$ref": f"#/components/headers/{name}"} for header, name in names.items()}
                response["headers"] = response.get("headers", {}) | shown


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
