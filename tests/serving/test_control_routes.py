"""Requests that end early, wait or are held, over HTTP."""

import re
from typing import Any

import httpx
import pytest
from tests.serving.servers import LONG, SMALL, Background, Gate, HookedEngine, error_of, serving, until

from flowroll.client import Client
from flowroll.engine.service import EngineService
from flowroll.errors import CancelledRequestError, DeadlineExceededError, PausedError
from flowroll.serving.parsing import MAX_CONTROL_BYTES

ROLLOUT = "/rollout/generate"


def test_an_aborted_request_is_answered_with_499_whether_it_runs_or_waits(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=2) as service, serving(service) as client, Client(str(client.base_url)) as own:
        caught: list[Exception] = []

        def roll(name: str) -> httpx.Response:
            try:
                own.rollout(**SMALL, request_id=name)
            except CancelledRequestError as error:
                caught.append(error)
            return httpx.Response(200)

        first = Background(lambda: roll("a"))
        until(lambda: service.status().counts.running == 1)
        others = [Background(lambda name=name: roll(name)) for name in ("b", "c")]
        until(lambda: service.status().counts.pending == 2)
        assert client.post("/abort_request", json={"request_id": "none"}).json() == {"num_aborted": 0}
        assert client.post("/abort_request", json={"rid": "b", "abort_all": False}).json() == {"num_aborted": 1}
        others[0].answer()
        assert len(caught) == 1 and service.status().counts.failed == 1
        assert client.post("/abort_request", json={"rid": "", "abort_all": True}).json() == {"num_aborted": 2}
        for request in (first, others[1]):
            request.answer()
        gate.opened.set()
        assert len(caught) == 3 and service.status().counts.failed == 3
        assert client.post(ROLLOUT, json=SMALL).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/abort_request", {}, "request_id"),
        ("/abort_request", {"request_id": "a", "rid": "a"}, "request_id"),
        ("/abort_request", {"request_id": "a", "abort_all": True}, "request_id"),
        ("/abort_request", {"request_id": 7}, "request_id"),
        ("/pause_generation", {"mode": "abort"}, "mode"),
        ("/continue_generation", {"mode": "finish"}, "mode"),
    ],
)
def test_what_cannot_be_meant_is_refused(server: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    response = server.post(path, json=body)
    assert (response.status_code, error_of(response)["field"]) == (422, field)
    assert not server.get("/server_info").json()["is_paused"]


@pytest.mark.parametrize("mode", ["finish", "freeze"])
def test_a_paused_server_refuses_new_requests_until_it_goes_on(hooked: HookedEngine, mode: str) -> None:
    body = {**SMALL, "num_inference_steps": 200, "rollout_debug_mode": False}
    with EngineService(hooked, max_queue=2) as service, serving(service) as client, Client(str(client.base_url)) as own:
        running = Background(lambda: client.post(ROLLOUT, json=body))
        until(lambda: service.status().load.steps > 0)
        paused = client.post("/pause_generation", json={"mode": mode}).json()
        assert paused["is_paused"] and paused["num_waiting"] == 0
        refused = client.post(ROLLOUT, json=SMALL)
        assert (refused.status_code, error_of(refused)["code"]) == (409, "paused")
        with pytest.raises(PausedError):
            own.generate(**SMALL)
        assert client.get("/readiness").status_code == 503 and client.get("/health").status_code == 200
        if mode == "finish":
            assert running.answer().status_code == 200
        else:
            steps = service.status().load.steps
            assert client.get("/health_generate").json()["evidence"] == "running"
            assert service.status().load.steps <= steps + 1
        assert client.post("/continue_generation").json()["is_paused"] is False
        assert running.answer().status_code == client.post(ROLLOUT, json=SMALL).status_code == 200


def test_a_request_that_misses_its_deadline_is_answered_with_408(server: httpx.Client, service: EngineService) -> None:
    before = service.status().load.failures.get("deadline_exceeded", 0)
    response = server.post(ROLLOUT, json=LONG, headers={"x-flowroll-deadline-s": "0.3"})
    assert (response.status_code, error_of(response)["code"]) == (408, DeadlineExceededError.code)
    until(lambda: service.status().load.running_samples == 0)
    assert service.status().load.failures["deadline_exceeded"] == before + 1
    assert server.post(ROLLOUT, json=SMALL, headers={"x-flowroll-deadline-s": "300"}).status_code == 200


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_deadline_that_is_none_is_refused(server: httpx.Client, service: EngineService, seconds: str) -> None:
    before = service.status().counts.accepted
    response = server.post(ROLLOUT, json=SMALL, headers={"x-flowroll-deadline-s": seconds})
    assert (response.status_code, error_of(response)["field"]) == (422, "x-flowroll-deadline-s")
    assert service.status().counts.accepted == before


def test_a_client_that_goes_away_takes_its_running_samples_with_it(server: httpx.Client, service: EngineService) -> None:
    cancelled = service.status().load.failures.get("cancelled", 0)
    with pytest.raises(httpx.ReadTimeout):
        server.post(ROLLOUT, json=LONG, timeout=httpx.Timeout(30.0, read=1.0))
    until(lambda: service.status().load.failures.get("cancelled", 0) == cancelled + 1)
    until(lambda: service.status().load.running_samples == 0)


@pytest.mark.parametrize("path", [ROLLOUT, "/generate"])
def test_an_answer_says_where_its_time_went(server: httpx.Client, path: str) -> None:
    shown = server.post(path, json=SMALL).headers["x-flowroll-timing"]
    stages = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", shown)}
    assert list(stages) == ["queue", "encode", "denoise", "decode", "serialise"]
    assert stages["denoise"] > 0
    assert "x-flowroll-timing" not in server.get("/health").headers


def test_metrics_show_batches_stages_and_failures(hooked: HookedEngine) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("no device")

    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        client.post(ROLLOUT, json={**SMALL, "num_outputs_per_prompt": 3})
        hooked.hook = fail
        client.post(ROLLOUT, json=SMALL)
        text = client.get("/metrics").text
    values = {name: float(value) for name, value in re.findall(r"^(flowroll_\S+) (\S+)$", text, re.MULTILINE)}
    assert values["flowroll_steps_total"] == values["flowroll_batch_samples_sum"] == 6
    assert values["flowroll_batch_samples_count"] == values['flowroll_batch_samples_bucket{le="+Inf"}']
    assert values['flowroll_batch_samples_bucket{le="4"}'] == values["flowroll_batch_samples_count"]
    assert values['flowroll_failed_requests_total{code="engine_error"}'] == 1
    for stage in ("encode", "denoise", "decode", "serialise", "send"):
        assert values[f'flowroll_stage_seconds_total{{stage="{stage}"}}'] > 0
    assert values["flowroll_queue_age_seconds"] == values["flowroll_running_samples"] == values["flowroll_is_paused"] == 0


@pytest.mark.parametrize(
    "path",
    [
        *("/abort_request", "/pause_generation", "/continue_generation", "/release_memory_occupation"),
        *("/resume_memory_occupation", "/load_lora_adapter", "/unload_lora_adapter", "/update_weights_from_disk"),
        *("/get_weights_checksum", "/init_weights_update_group", "/destroy_weights_update_group", "/weights/begin"),
        "/weights/none/commit",
    ],
)
def test_what_steers_is_short_or_not_read(server: httpx.Client, path: str) -> None:
    """It is parsed on the event loop."""
    response = server.post(path, content=b" " * (MAX_CONTROL_BYTES + 1), headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")
