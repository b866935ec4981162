"""Health, info and metrics."""

import dataclasses
import re
from pathlib import Path

import httpx
import pytest
from tests.serving.servers import SMALL, Background, Gate, HookedEngine, error_of, serving, until

from flowroll.engine.service import EngineService, probe
from flowroll.families import FAMILIES


def test_probes_answer_ok_on_an_idle_server(server: httpx.Client) -> None:
    for path in ("/health", "/liveness", "/readiness"):
        response = server.get(path)
        assert response.status_code == 200 and response.json()["status"] == "ok"


def test_server_info_shows_engine_limits_and_queue(server: httpx.Client, service: EngineService) -> None:
    info = server.get("/server_info").json()
    engine = service.engine.info
    assert (info["family"], info["variant"], info["dtype"]) == ("qwen_image", engine.variant, "float32")
    assert info["limits"] == dataclasses.asdict(engine.limits)
    assert info["defaults"]["num_inference_steps"] == engine.defaults.num_inference_steps
    assert info["pixel_unit"] == 16 and info["weight_version"] == "0" and info["is_ready"]
    assert {"torch", "diffusers"} <= set(info["versions"])
    queue = info["queue"]
    assert queue["accepted"] == queue["completed"] + queue["failed"] + queue["pending"] + queue["running"]


@pytest.mark.parametrize("family", FAMILIES)
def test_health_generate_makes_a_one_step_image_once_and_then_reports_it(checkpoints: dict[str, Path], family: str) -> None:
    with (
        HookedEngine(checkpoints[family], device="cpu") as engine,
        EngineService(engine, max_queue=1) as service,
        serving(service) as client,
    ):
        assert client.get("/health_generate").json() == {"status": "ok", "evidence": "probe"}
        assert client.get("/health_generate").json() == {"status": "ok", "evidence": "recent"}
        assert service.status().counts.accepted == 1


def test_health_generate_reports_a_generation_that_runs_without_waiting_for_it(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        running = Background(lambda: client.post("/rollout/generate", json=SMALL))
        assert gate.entered.wait(10)
        assert client.get("/health_generate").json()["evidence"] == "running"
        gate.opened.set()
        assert running.answer().status_code == 200


def test_simultaneous_probes_share_one_generation(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        probes = [Background(lambda: client.get("/health_generate")) for _ in range(4)]
        assert gate.entered.wait(10)
        gate.opened.set()
        assert {request.answer().json()["status"] for request in probes} == {"ok"}
        assert service.status().counts.accepted == 1


def test_health_generate_fails_when_its_image_fails(hooked: HookedEngine) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("no device")

    hooked.hook = fail
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        response = client.get("/health_generate")
        assert response.status_code == 503
        assert error_of(response)["code"] == "engine_error"
        assert client.get("/health").status_code == 200


def test_health_generate_fails_when_its_image_does_not_end(hooked: HookedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT_S", 0.1)
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        for _ in range(2):
            assert client.get("/health_generate").status_code == 503
        assert service.status().counts.accepted == 1
        gate.opened.set()
        until(lambda: service.status().counts.running == 0)
        assert client.get("/health_generate").json()["evidence"] == "recent"


def test_health_generate_fails_while_a_request_is_stuck(hooked: HookedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        monkeypatch.setattr(hooked.scheduler, "is_progressing", lambda: False)
        running = Background(lambda: client.post("/rollout/generate", json=SMALL))
        assert gate.entered.wait(10)
        assert client.get("/health_generate").status_code == 503
        gate.opened.set()
        running.answer()


def test_a_draining_server_is_alive_but_not_ready(hooked: HookedEngine) -> None:
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        service.drain()
        assert client.get("/liveness").status_code == client.get("/health").status_code == 200
        for path in ("/readiness", "/health_generate"):
            response = client.get(path)
            assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")


def test_a_server_whose_engine_thread_ended_is_not_healthy(hooked: HookedEngine) -> None:
    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        service.close()
        assert client.get("/liveness").status_code == 200
        assert client.get("/health").status_code == 503


def test_metrics_count_requests_samples_steps_and_balance(hooked: HookedEngine) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("no device")

    with EngineService(hooked, max_queue=1) as service, serving(service) as client:
        rollout = {**SMALL, "num_inference_steps": 3, "num_outputs_per_prompt": 2, "rollout_sde_step_indices": [0]}
        answered = client.post("/rollout/generate", json=rollout)
        client.post("/generate", json=SMALL)
        client.post("/rollout/generate", json={**SMALL, "height": 100})
        client.get("/no/such/path")
        client.get("/another")
        hooked.hook = fail
        client.post("/generate", json=SMALL)
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = _values(response.text)
    assert values['flowroll_requests_total{code="200",route="/rollout/generate"}'] == 1
    assert values['flowroll_requests_total{code="422",route="/rollout/generate"}'] == 1
    assert values['flowroll_requests_total{code="500",route="/generate"}'] == 1
    assert values['flowroll_requests_total{code="404",route="other"}'] == 2
    codes = {"invalid_request": 1, "not_found": 2, "engine_error": 1}
    assert {name: values[f'flowroll_errors_total{{code="{name}"}}'] for name in codes} == codes
    assert values['flowroll_samples_total{kind="rollout"}'] == 2
    assert values['flowroll_samples_total{kind="generate"}'] == 1
    assert values['flowroll_denoising_steps_total{kind="rollout"}'] == 6
    assert values['flowroll_denoising_steps_total{kind="generate"}'] == 2
    assert values["flowroll_sde_steps_total"] == 2
    assert values['flowroll_request_seconds_count{route="/rollout/generate"}'] == 2
    assert values['flowroll_response_bytes_total{route="/rollout/generate"}'] > len(answered.content)
    assert values["flowroll_queue_depth"] == values["flowroll_running_requests"] == 0
    assert values["flowroll_accepted_requests_total"] == 3
    assert values['flowroll_ended_requests_total{outcome="completed"}'] == 2
    assert values['flowroll_ended_requests_total{outcome="failed"}'] == 1


def test_metrics_show_the_queue_while_requests_wait(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=2) as service, serving(service) as client:
        requests = [Background(lambda: client.post("/generate", json=SMALL)) for _ in range(3)]
        until(lambda: service.status().counts.pending == 2 and service.status().counts.running == 1)
        values = _values(client.get("/metrics").text)
        assert (values["flowroll_queue_depth"], values["flowroll_running_requests"]) == (2, 1)
        gate.opened.set()
        for request in requests:
            request.answer()


def test_two_apps_count_apart(service: EngineService, server: httpx.Client) -> None:
    with serving(service) as other:
        other.get("/health")
        other.get("/health")
        values = _values(other.get("/metrics").text)
    assert values['flowroll_requests_total{code="200",route="/health"}'] == 2


def _values(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(flowroll_\S+) (\S+)$", text, re.MULTILINE)}
