"""What is asked of each route, and what is read of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from os import PathLike
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from flowroll.client.exchange import Call, excerpt, post, read_by, read_object
from flowroll.errors import InvalidRequestError, ServerConnectionError
from flowroll.replay.remote import score_params, scores_of
from flowroll.replay.scoring import Scores
from flowroll.types import (
    ALIASES,
    AdapterChange,
    GeneratedImage,
    LoraAdapter,
    MemoryChange,
    Number,
    Rollout,
    SamplingParams,
    WeightUpdate,
    by_field_name,
)
from flowroll.wire.codec import JSON, MSGPACK, WireFormat, decode_images, decode_rollouts
from flowroll.wire.names import (
    ADAPTERS_ROUTE,
    CHECKSUM_ROUTE,
    EXTRA,
    EXTRA_ONLY,
    GENERATE_ROUTE,
    LOAD_ADAPTER_ROUTE,
    RELEASE_ROUTE,
    RESUME_ROUTE,
    ROLLOUT_ROUTE,
    SCORE_ROUTE,
    UNLOAD_ADAPTER_ROUTE,
    UPDATE_FROM_DISK_ROUTE,
    VERIFY_ROUTE,
    closest,
)
from flowroll.wire.scoring import decode_score_answer, encode_score_request

T = TypeVar("T")
UpdateMode: TypeAlias = Literal["drain", "abort"]
_PROBE_TIMEOUT_S = 5.0
_ACCEPT: Mapping[WireFormat, str] = {"json": JSON, "msgpack": MSGPACK}
_PARAMS = {field.name: field for field in fields(SamplingParams)}


class _Verified(msgspec.Struct, frozen=True):
    num_tensors: int


class _Adapters(msgspec.Struct, frozen=True):
    adapters: list[LoraAdapter]


UPDATE = msgspec.json.Decoder(WeightUpdate)
CHANGE = msgspec.json.Decoder(AdapterChange)
_ADAPTERS = msgspec.json.Decoder(_Adapters)
_MEMORY = msgspec.json.Decoder(MemoryChange)
_SUMS = msgspec.json.Decoder(dict[str, str])
_VERIFIED = msgspec.json.Decoder(_Verified)


def rollout_call(params: SamplingParams | None, values: Mapping[str, Any], wire_format: WireFormat) -> Call[list[Rollout]]:
    """POST /rollout/generate.

    Raises:
        InvalidRequestError: A value breaks a rule that needs no model.
    """
    body = _request_body(_given(params, values))
    return Call(method="POST", path=ROLLOUT_ROUTE, read=decode_rollouts, accept=_ACCEPT[wire_format], content=body)


def generate_call(
    params: SamplingParams | None, values: Mapping[str, Any], wire_format: WireFormat
) -> Call[list[GeneratedImage]]:
    """POST /generate.

    Raises:
        InvalidRequestError: A value breaks a rule that needs no model.
    """
    given = _given(params, values)
    if params is not None:
        # Plain generation by definition; the route knows no such field.
        given.pop("rollout", None)
    body = _request_body(given)
    return Call(method="POST", path=GENERATE_ROUTE, read=decode_images, accept=_ACCEPT[wire_format], content=body)


def update_from_disk_call(
    path: str | PathLike[str], module: str, weight_version: str | None, mode: UpdateMode
) -> Call[WeightUpdate]:
    """POST /update_weights_from_disk."""
    sent = {"model_path": str(path), "module": module, "weight_version": weight_version, "mode": mode}
    return post(UPDATE_FROM_DISK_ROUTE, sent, lambda body, _: read_by(UPDATE, body))


def load_adapter_call(
    name: str, path: str | PathLike[str], merged: bool, weight_version: str | None, mode: UpdateMode
) -> Call[AdapterChange]:
    """POST /load_lora_adapter."""
    sent = {"lora_name": name, "lora_path": str(path), "merged": merged, "weight_version": weight_version, "mode": mode}
    return post(LOAD_ADAPTER_ROUTE, sent, lambda body, _: read_by(CHANGE, body))


def unload_adapter_call(name: str, weight_version: str | None, mode: UpdateMode) -> Call[AdapterChange]:
    """POST /unload_lora_adapter."""
    sent = {"lora_name": name, "weight_version": weight_version, "mode": mode}
    return post(UNLOAD_ADAPTER_ROUTE, sent, lambda body, _: read_by(CHANGE, body))


def adapters_call() -> Call[list[LoraAdapter]]:
    """GET /lora_adapters."""
    return Call(method="GET", path=ADAPTERS_ROUTE, read=lambda body, _: read_by(_ADAPTERS, body).adapters)


def release_memory_call(mode: str) -> Call[MemoryChange]:
    """POST /release_memory_occupation."""
    return post(RELEASE_ROUTE, {"mode": mode}, lambda body, _: read_by(_MEMORY, body))


def resume_memory_call() -> Call[MemoryChange]:
    """POST /resume_memory_occupation."""
    return post(RESUME_ROUTE, {}, lambda body, _: read_by(_MEMORY, body))


def checksum_call(module: str) -> Call[str]:
    """POST /get_weights_checksum."""
    return post(CHECKSUM_ROUTE, {"module_names": [module]}, lambda body, _: _read_sum(body, module))


def verify_call(expected: Mapping[str, str], module: str) -> Call[int]:
    """POST /verify_weights."""
    sent = {"module": module, "expected": dict(expected)}
    return post(VERIFY_ROUTE, sent, lambda body, _: read_by(_VERIFIED, body).num_tensors)


def score_call(
    rollouts: Sequence[Rollout],
    steps: Sequence[int] | None,
    log_probs_only: bool,
    min_weight_version: str | None,
    wire_format: WireFormat,
) -> Call[Scores]:
    """POST /rollout/score.

    Raises:
        InvalidRequestError: A rollout cannot be replayed; the message names the remedy.
    """
    params = score_params(rollouts, steps, log_probs_only=log_probs_only, min_weight_version=min_weight_version)
    body = encode_score_request(params, wire_format=wire_format)
    asked = [sample.steps for sample in params.samples]

    def read(answer_body: bytearray, content_type: str) -> Scores:
        answer = decode_score_answer(answer_body, content_type)
        if [sample.steps for sample in answer.samples] != asked:
            raise ServerConnectionError("the answer must hold the scores that were asked for, got others; retry.")
        return scores_of(answer)

    content = b"".join(body.chunks())
    accept = _ACCEPT[wire_format]
    return Call(method="POST", path=SCORE_ROUTE, read=read, accept=accept, content=content, content_type=body.content_type)


def object_call(path: str) -> Call[dict[str, Any]]:
    """GET of a route that answers with a JSON object."""
    return Call(method="GET", path=path, read=read_object)


def models_call() -> Call[list[dict[str, Any]]]:
    """GET /v1/models."""
    return Call(method="GET", path="/v1/models", read=_read_models)


def metrics_call() -> Call[str]:
    """GET /metrics."""
    return Call(method="GET", path="/metrics", read=_read_text, accept="text/plain")


def readiness_call(remaining_s: Number) -> Call[dict[str, Any]]:
    """GET /readiness, without waiting for a server that does not answer at all."""
    return Call(method="GET", path="/readiness", read=read_object, timeout_s=min(max(remaining_s, 0.1), _PROBE_TIMEOUT_S))


def _given(params: SamplingParams | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters to send, by the fields of `SamplingParams`: those given, or those that differ from the defaults."""
    if params is not None:
        if values:
            raise InvalidRequestError("params must be given alone, got further fields; set them in SamplingParams.")
        return {
            name: getattr(params, name)
            for name, field in _PARAMS.items()
            if field.default is MISSING or getattr(params, name) != field.default
        }
    for name in values:
        if name not in _PARAMS and name not in ALIASES:
            guess = closest(name, [*_PARAMS, *ALIASES])
            remedy = f"use {guess} if that is meant" if guess else f"use one of {', '.join(_PARAMS)}"
            raise InvalidRequestError(f"{name} must be a field of SamplingParams, got an unknown name; {remedy}.", field=name)
    if "prompt" not in values:
        raise InvalidRequestError("prompt must be given, got nothing; send one prompt as text.", field="prompt")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    SamplingParams(**given)
    return by_field_name(given)


def _request_body(given: Mapping[str, Any]) -> bytes:
    sent: dict[str, Any] = {name: value for name, value in given.items() if name not in EXTRA_ONLY}
    if extra := {name: value for name, value in given.items() if name in EXTRA_ONLY}:
        sent[EXTRA] = extra
    try:
        return msgspec.json.encode(sent)
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"the request must hold plain values, got {error}; convert it.") from error


def _read_sum(body: bytearray, module: str) -> str:
    digest = read_by(_SUMS, body).get(module)
    if digest is None:
        raise ServerConnectionError(f"the answer must hold the sum of {module}, got {excerpt(body)}; check the URL.")
    return digest


def _read_models(body: bytearray, content_type: str) -> list[dict[str, Any]]:
    models = read_object(body, content_type).get("data")
    if not isinstance(models, list):
        raise ServerConnectionError(f"the answer must list models in data, got {excerpt(body)}; check the URL.")
    return models


def _read_text(body: bytearray, content_type: str) -> str:
    return body.decode(errors="replace")
