"""Every way to fail: status, code, field, and no more than that."""

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.serving.servers import SMALL, Background, Gate, HookedEngine, error_of, serving, until

from flowroll.engine.plan import RequestPlan
from flowroll.engine.service import EngineService
from flowroll.errors import error_from_wire
from flowroll.sampling.dynamics import DYNAMICS

ROUTES = ("/rollout/generate", "/generate", "/v1/images/generations")
KEY = "s3cret"


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"prompt": None}, "prompt", "given"),
        ({"colour": "red"}, "colour", "unknown"),
        ({"rolout": True}, "rolout", "rollout"),
        ({"height": 100}, "height", "use 96 or 112"),
        ({"height": "64"}, "height", "integer"),
        ({"width": 1024, "height": 1024}, "height", "262144 pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps", ">= 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "1000 steps"),
        ({"num_outputs_per_prompt": 65}, "num_outputs_per_prompt", "64 samples"),
        ({"seed": 2**32}, "seed", "4294967295"),
        ({"seed": -1}, "seed", "0"),
        ({"seeds": [1, 2]}, "seeds", "together with seed"),
        ({"guidance_scale": -1}, "guidance_scale", "use 0"),
        ({"rollout_noise_level": 11}, "rollout_noise_level", "10"),
        ({"rollout_noise_level": 2, "rollout_sde_type": "cps"}, "rollout_noise_level", "below 2 for cps"),
        ({"rollout_sde_type": "flow-sde"}, "rollout_sde_type", ", ".join(DYNAMICS)),
        ({"rollout": False, "rollout_return_denoising_env": True}, "rollout_return_denoising_env", "evaluation"),
        ({"rollout_sde_step_indices": [2]}, "rollout_sde_step_indices", "0..1"),
        ({"rollout_sde_step_indices": [0, 0]}, "rollout_sde_step_indices", "once"),
        ({"rollout_return_step_indices": [3]}, "rollout_return_step_indices", "0..2"),
        ({"num_frames": 2}, "num_frames", "null or 1"),
        ({"fps": "24"}, "fps", "a number"),
        ({"generator_device": "tpu"}, "generator_device", "cpu"),
        ({"extra_sampling_params": {"sigmas": [1.0, 0.5]}}, "extra_sampling_params.sigmas", "end at 0"),
        (
            {"extra_sampling_params": {"sigmas": [1, 0.999995, 0.5, 0]}, "num_inference_steps": None},
            "extra_sampling_params.sigmas",
            "rollout_sde_step_indices",
        ),
    ],
)
def test_a_bad_value_is_a_422_that_names_the_field_as_the_wire_has_it(
    server: httpx.Client, service: EngineService, change: dict[str, Any], field: str, words: str
) -> None:
    before = service.status().counts.accepted
    response = server.post("/rollout/generate", json={**SMALL, **change})
    assert response.status_code == 422
    error = error_of(response)
    assert (error["code"], error["field"]) == ("invalid_request", field)
    assert error["message"].startswith(field) and words in error["message"]
    assert response.headers["x-request-id"]
    assert service.status().counts.accepted == before


def test_a_refused_request_carries_its_callers_id(server: httpx.Client) -> None:
    response = server.post("/rollout/generate", json={**SMALL, "height": 100, "request_id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (422, "mine")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"prompt": NaN}', b"\xff\xfe", b"[" * 20_000])
@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_is_no_json_object_is_a_400(server: httpx.Client, route: str, body: bytes) -> None:
    response = server.post(route, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "malformed_request"


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"content-type": "text/plain"}, "content-type"),
        ({"content-type": ""}, "content-type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "content-encoding"),
    ],
)
def test_a_body_sent_as_something_else_is_a_415(server: httpx.Client, headers: dict[str, str], field: str) -> None:
    response = server.post("/generate", content=json.dumps(SMALL), headers=headers)
    assert response.status_code == 415
    error = error_of(response)
    assert (error["code"], error["field"]) == ("malformed_request", field)


def test_a_charset_beside_the_content_type_is_fine(server: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.post("/generate", content=json.dumps(SMALL), headers=headers).status_code == 200


def test_unknown_paths_are_404_and_wrong_methods_405(server: httpx.Client) -> None:
    for path in ("/nope", "/generate/", "/rollout"):
        response = server.get(path)
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = server.get("/rollout/generate")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "POST" in error_of(response)["message"]
    assert server.post("/health").status_code == 405


def test_a_body_above_the_limit_is_a_413_whether_or_not_its_length_is_declared(service: EngineService) -> None:
    def undeclared() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    large = json.dumps({**SMALL, "prompt": "a fox " * 200}).encode()
    with serving(service, max_body_bytes=1000) as client:
        headers = {"content-type": "application/json"}
        assert client.post("/rollout/generate", json=SMALL).status_code == 200
        for path, content in (
            ("/rollout/generate", large),
            ("/v1/images/generations", b" " * 1001),
            ("/abort_request", undeclared()),
        ):
            response = client.post(path, content=content, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")
        exactly = json.dumps(SMALL).encode().ljust(1000)
        assert client.post("/rollout/generate", content=exactly, headers=headers).status_code == 200


def test_a_declared_length_above_the_limit_is_refused_before_the_body_comes(server: httpx.Client) -> None:
    with socket.create_connection((server.base_url.host, server.base_url.port or 80), timeout=5) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 9999999999\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_a_429_that_says_when_to_come_back(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        taken = [Background(lambda: client.post("/rollout/generate", json=SMALL)) for _ in range(2)]
        until(lambda: service.status().counts.pending == 1 and service.status().counts.running == 1)
        response = client.post("/rollout/generate", json=SMALL)
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        gate.opened.set()
        assert [request.answer().status_code for request in taken] == [200, 200]


def test_a_client_that_goes_away_disturbs_no_other(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/rollout/generate", json=SMALL, timeout=0.1)
        other = Background(lambda: client.post("/rollout/generate", json=SMALL))
        until(lambda: service.status().counts.accepted == 2)
        gate.opened.set()
        assert other.answer().status_code == 200
        stats = service.status().counts
        assert (stats.accepted, stats.completed, stats.failed) == (2, 1, 1)


@pytest.mark.parametrize("route", ROUTES)
def test_a_failure_in_the_engine_is_a_500_of_that_request_alone(
    hooked: HookedEngine, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once(plan: RequestPlan) -> None:
        hooked.hook = lambda plan: None
        raise RuntimeError("the device fell over\nframe 1\nframe 2")

    body = SMALL if "images" not in route else {"prompt": "a cat", "size": "64x64", "num_inference_steps": 2}
    hooked.hook = fail_once
    with EngineService(hooked, max_queue=1) as service, serving(service) as client, caplog.at_level(logging.ERROR):
        response = client.post(route, json=body)
        assert response.status_code == 500
        error = error_of(response)
        assert error["code"] == "engine_error"
        assert "the device fell over" in error["message"] and "frame" not in error["message"]
        assert client.post(route, json=body).status_code == 200
    logged = [record for record in caplog.records if record.exc_info]
    assert logged[0].request_id == response.headers["x-request-id"]


def test_a_defect_of_the_server_itself_is_a_500_with_our_body_and_a_trace_in_the_log(
    hooked: HookedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*_: object, **__: object) -> None:
        raise KeyError("internal detail")

    monkeypatch.setattr("flowroll.serving.routers.rollout.encode_rollouts", defect)
    with EngineService(hooked, max_queue=1) as service, serving(service) as client, caplog.at_level(logging.ERROR):
        response = client.post("/rollout/generate", json=SMALL)
    assert response.status_code == 500
    error = error_of(response)
    assert error["code"] == "engine_error" and "internal detail" not in error["message"]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.name == "flowroll.serving.middleware"


@pytest.mark.parametrize("route", ROUTES)
def test_a_draining_server_answers_503(hooked: HookedEngine, route: str) -> None:
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        service.drain()
        body = SMALL if "images" not in route else {"prompt": "a cat", "size": "64x64", "num_inference_steps": 2}
        response = client.post(route, json=body)
    assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")


def test_a_token_is_demanded_of_every_route_but_liveness(service: EngineService) -> None:
    with serving(service, api_key=KEY) as client:
        paths = [(method.upper(), path) for path, methods in _paths(client).items() for method in methods]
        assert len(paths) > 8
        for method, path in [*paths, ("GET", "/openapi.json"), ("GET", "/nope")]:
            response = client.request(method, path, json=SMALL if method == "POST" else None)
            if path == "/liveness":
                assert response.status_code == 200
                continue
            assert response.status_code == 401, path
            assert error_of(response)["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (b"Bearer \xff\xfe", 401),
    ],
)
def test_only_the_token_itself_opens(service: EngineService, sent: str | bytes, status: int) -> None:
    with serving(service, api_key=KEY) as client:
        assert client.get("/health", headers={"authorization": sent}).status_code == status


def test_the_api_key_is_shown_nowhere(service: EngineService) -> None:
    with serving(service, api_key=KEY) as client:
        headers = {"authorization": f"Bearer {KEY}"}
        for path in ("/server_info", "/openapi.json", "/metrics"):
            assert KEY not in client.get(path, headers=headers).text


def test_every_error_reaches_a_client_as_the_class_that_was_raised(server: httpx.Client, service: EngineService) -> None:
    response = server.post("/rollout/generate", json={**SMALL, "height": 100})
    error = error_of(response)
    raised = error_from_wire(error["code"], error["message"], error["field"])
    assert type(raised).__name__ == "InvalidRequestError" and raised.status == response.status_code


def _paths(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()["paths"]
