"""Memory of the weights over HTTP: released, resumed, and what is answered in between."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.rollouts import assert_same_bits
from tests.serving.servers import SMALL, error_of, serving
from tests.weights import REQUEST

from flowroll.client import AsyncClient, Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import AsleepError

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


@pytest.fixture(scope="module")
def server(z_image_checkpoint: Path) -> Iterator[httpx.Client]:
    with (
        Engine(z_image_checkpoint, device="cpu") as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service, weights_roots=(str(z_image_checkpoint),)) as client,
    ):
        yield client


@pytest.fixture
def client(server: httpx.Client) -> Iterator[Client]:
    with Client(str(server.base_url)) as client:
        yield client
        client.resume_memory()


def test_asleep_whatever_needs_weights_is_a_409_and_awake_all_is_as_before(
    client: Client, server: httpx.Client, z_image_checkpoint: Path
) -> None:
    before = client.rollout(**REQUEST)[0], client.weights_checksum(), client.server_info()["weight_version"]
    released = client.release_memory("disk")
    assert released.mode == "disk" and released.num_bytes > 0
    for call in (
        lambda: client.rollout(**REQUEST),
        lambda: client.generate(prompt="a cat"),
        lambda: client.score(before[:1]),
        lambda: client.update_weights_from_disk(z_image_checkpoint),
        lambda: client.weights_checksum(),
        lambda: client.unload_lora_adapter("p"),
    ):
        with pytest.raises(AsleepError):
            call()
    answer = server.post("/v1/images/generations", json={"prompt": "a cat"})
    assert (answer.status_code, error_of(answer)["code"]) == (409, "asleep")
    assert server.get("/health").json() == {"status": "ok", "is_asleep": True}
    assert server.get("/health_generate").json()["evidence"] == "asleep"
    ready = server.get("/readiness")
    assert (ready.status_code, error_of(ready)["code"]) == (503, "asleep")
    info = client.server_info()
    assert (info["is_asleep"], info["is_ready"]) == (True, False)
    assert "flowroll_is_asleep 1" in client.metrics()
    assert client.resume_memory().num_bytes == released.num_bytes
    assert server.get("/health").json() == {"status": "ok", "is_asleep": False}
    assert server.get("/readiness").status_code == 200
    assert_same_bits(client.rollout(**REQUEST)[0], before[0])
    assert (client.weights_checksum(), client.server_info()["weight_version"]) == before[1:]


def test_a_server_that_discarded_its_weights_is_not_ready_before_a_trainer_has_pushed_all(
    client: Client, server: httpx.Client, z_image_checkpoint: Path
) -> None:
    before = client.rollout(**REQUEST)[0], client.weights_checksum()
    released = client.release_memory("discard")
    assert released.mode == "discard" and released.num_bytes > 0
    with pytest.raises(AsleepError, match="wake it first"):
        client.update_weights_from_disk(z_image_checkpoint)
    assert client.resume_memory().mode == "discard"
    with pytest.raises(AsleepError, match="send a complete update of the transformer"):
        client.rollout(**REQUEST)
    ready = server.get("/readiness")
    assert (ready.status_code, error_of(ready)["code"]) == (503, "asleep")
    assert "send all weights" in error_of(ready)["message"]
    client.update_weights_from_disk(z_image_checkpoint)
    assert server.get("/readiness").status_code == 200
    assert_same_bits(client.rollout(**REQUEST)[0], before[0])
    assert client.weights_checksum() == before[1]


def test_a_trainer_of_sglang_is_understood(server: httpx.Client, client: Client) -> None:
    assert server.post(RELEASE, json={"tags": ["kv_cache"]}).json()["is_asleep"] is False
    assert server.post(RELEASE, json={"tags": ["weights"]}).json()["is_asleep"] is True
    assert server.post(RESUME, json={"tags": ["kv_cache"]}).json()["is_asleep"] is True
    assert server.post(RELEASE).json() == {
        "success": True,
        "is_asleep": True,
        "mode": "offload",
        "num_bytes": 0,
        "seconds": pytest.approx(0, abs=60),
    }
    assert server.post(RESUME).json()["is_asleep"] is False
    assert server.post("/rollout/generate", json=SMALL).status_code == 200


def test_the_asynchronous_client_does_the_same(server: httpx.Client) -> None:
    async def run() -> None:
        async with AsyncClient(str(server.base_url)) as other:
            released = await other.release_memory("disk")
            assert (await other.resume_memory()).num_bytes == released.num_bytes

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (RELEASE, {"mode": "drop"}, "mode"),
        (RELEASE, {"tags": []}, "tags"),
        (RELEASE, {"tags": ["everything"]}, "tags"),
        (RESUME, {"mode": "disk"}, "mode"),
        (RESUME, {"tag": "weights"}, "tag"),
    ],
)
def test_bad_requests_are_refused_by_name(server: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    answer = server.post(path, json=body)
    assert answer.status_code == 422 and error_of(answer)["field"].startswith(field)
