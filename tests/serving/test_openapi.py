"""The OpenAPI document: complete although the routes read the raw body."""

import json
from typing import Any

import httpx
import msgspec
import pytest
from tests.serving.servers import serving

from flowroll.engine.service import EngineService
from flowroll.wire.group import DestroyGroupRequest, InitGroupRequest, UpdateFromGroupRequest
from flowroll.wire.messages import WireImage, WireSample, WireSampleScores, WireScoreAnswer, WireScoreRequest, WireSteps
from flowroll.wire.schema import ExtraSamplingParams, GenerateRequest, ImageEditsRequest, ImagesRequest, RolloutRequest
from flowroll.wire.scoring import decode_score_request
from flowroll.wire.weight_updates import BeginUpdateRequest, CheckUpdateRequest, CommitUpdateRequest, UpdateFromTensorRequest
from flowroll.wire.weights import ChecksumRequest, UpdateFromDiskRequest, VerifyRequest

ROUTES = {
    "/rollout/generate": {"post"},
    "/rollout/score": {"post"},
    "/generate": {"post"},
    "/v1/images/generations": {"post"},
    "/v1/images/edits": {"post"},
    "/update_weights_from_disk": {"post"},
    "/update_weights_from_safetensors": {"post"},
    "/update_weights_from_tensor": {"post"},
    "/update_weights_from_tensor_checker": {"post"},
    "/init_weights_update_group": {"post"},
    "/update_weights_from_distributed": {"post"},
    "/destroy_weights_update_group": {"post"},
    "/weights/begin": {"post"},
    "/weights/{update_id}/buckets": {"post"},
    "/weights/{update_id}/commit": {"post"},
    "/weights/{update_id}/abort": {"post"},
    "/get_weights_checksum": {"post"},
    "/verify_weights": {"post"},
    "/load_lora_adapter": {"post"},
    "/load_lora_adapter_from_tensors": {"post"},
    "/unload_lora_adapter": {"post"},
    "/lora_adapters": {"get"},
    "/policies": {"get"},
    "/policies/{name}/copy": {"post"},
    "/policies/{name}/ema": {"post"},
    "/policies/{name}/drop": {"post"},
    "/release_memory_occupation": {"post"},
    "/resume_memory_occupation": {"post"},
    "/v1/models": {"get"},
    "/abort_request": {"post"},
    "/pause_generation": {"post"},
    "/continue_generation": {"post"},
    "/pause": {"post"},
    "/resume": {"post"},
    "/is_paused": {"get"},
    "/abort_requests": {"post"},
    "/get_world_size": {"get"},
    "/init_weight_transfer_engine": {"post"},
    "/shutdown_weight_transfer_engine": {"post"},
    "/weight_info": {"get"},
    "/start_weight_update": {"post"},
    "/update_weights": {"post"},
    "/finish_weight_update": {"post"},
    "/health": {"get"},
    "/health_generate": {"get"},
    "/liveness": {"get"},
    "/readiness": {"get"},
    "/server_info": {"get"},
    "/metrics": {"get"},
}


@pytest.fixture(scope="module")
def document(server: httpx.Client) -> dict[str, Any]:
    return server.get("/openapi.json").json()


def test_document_lists_every_route(document: dict[str, Any]) -> None:
    assert {path: set(methods) for path, methods in document["paths"].items()} == ROUTES


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/rollout/generate", RolloutRequest),
        ("/rollout/score", WireScoreRequest),
        ("/generate", GenerateRequest),
        ("/v1/images/generations", ImagesRequest),
        ("/v1/images/edits", ImageEditsRequest),
        ("/update_weights_from_disk", UpdateFromDiskRequest),
        ("/get_weights_checksum", ChecksumRequest),
        ("/verify_weights", VerifyRequest),
        ("/update_weights_from_tensor", UpdateFromTensorRequest),
        ("/update_weights_from_tensor_checker", CheckUpdateRequest),
        ("/init_weights_update_group", InitGroupRequest),
        ("/update_weights_from_distributed", UpdateFromGroupRequest),
        ("/destroy_weights_update_group", DestroyGroupRequest),
        ("/weights/begin", BeginUpdateRequest),
        ("/weights/{update_id}/commit", CommitUpdateRequest),
    ],
)
def test_request_bodies_show_every_field_with_its_description(
    document: dict[str, Any], path: str, model: type[msgspec.Struct]
) -> None:
    body = document["paths"][path]["post"]["requestBody"]
    assert body["required"]
    media_type = "multipart/form-data" if model is ImageEditsRequest else "application/json"
    shown = _resolve(document, body["content"][media_type]["schema"])
    assert set(shown["properties"]) == set(model.__struct_fields__)
    assert all("description" in field for field in shown["properties"].values())
    assert shown["additionalProperties"] is False
    assert shown["examples"]


def test_nested_parameters_are_shown_too(document: dict[str, Any]) -> None:
    shown = document["components"]["schemas"]["ExtraSamplingParams"]
    assert set(shown["properties"]) == set(ExtraSamplingParams.__struct_fields__)


@pytest.mark.parametrize(("path", "model"), [("/rollout/generate", WireSample), ("/generate", WireImage)])
def test_answers_show_every_field_and_media_type(document: dict[str, Any], path: str, model: type[msgspec.Struct]) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    shown = _resolve(document, content["application/json"]["schema"]["items"])
    assert set(shown["properties"]) == set(model.__struct_fields__)
    expected = {"application/json", "application/msgpack"} | ({"image/png"} if path == "/generate" else set())
    assert set(content) == expected


def test_requests_and_answers_of_scores_are_shown_as_the_codec_has_them(document: dict[str, Any]) -> None:
    route = document["paths"]["/rollout/score"]["post"]
    request, answer = route["requestBody"]["content"], route["responses"]["200"]["content"]
    assert set(request) == set(answer) == {"application/json", "application/msgpack"}
    for shown, struct, nested in (
        (request, WireScoreRequest, WireSteps),
        (answer, WireScoreAnswer, WireSampleScores),
    ):
        schema = _resolve(document, shown["application/json"]["schema"])
        assert set(schema["properties"]) == set(struct.__struct_fields__)
        inner = _resolve(document, schema["properties"]["samples"]["items"])
        assert set(inner["properties"]) == set(nested.__struct_fields__)
        assert all("description" in field for field in inner["properties"].values())


def test_the_example_of_a_request_for_scores_can_be_read(document: dict[str, Any]) -> None:
    route = document["paths"]["/rollout/score"]["post"]
    schema = _resolve(document, route["requestBody"]["content"]["application/json"]["schema"])
    params = decode_score_request(json.dumps(schema["examples"][0]).encode(), "application/json")
    assert params.samples[0].latents.tolist() == [[0.5, -1.0]]


def test_openai_answer_is_shown(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]["content"]
    assert set(_resolve(document, content["application/json"]["schema"])["properties"]) == {"created", "data"}


def test_work_routes_show_every_error_status(document: dict[str, Any]) -> None:
    for path in ("/rollout/generate", "/rollout/score", "/generate", "/v1/images/generations", "/v1/images/edits"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "406", "413", "415", "422", "429", "500", "503"} <= set(responses)
        error = _resolve(document, responses["422"]["content"]["application/json"]["schema"])
        assert set(error["properties"]) == {"error"}


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    references = list(_references(document))
    assert references
    for reference in references:
        _resolve(document, {"$ref": reference})


def test_document_tells_of_the_token_where_one_is_demanded(document: dict[str, Any], service: EngineService) -> None:
    assert "security" not in document
    with serving(service, api_key="s3cret") as client:
        guarded = client.get("/openapi.json", headers={"authorization": "Bearer s3cret"}).json()
    assert guarded["security"] == [{"token": []}]
    assert guarded["paths"]["/liveness"]["get"]["security"] == []


def _references(node: Any) -> Any:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    found: Any = schema
    while "$ref" in found:
        node: Any = document
        for part in found["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        found = node
    return found
