"""Our own client against our own server: the same rollouts, the same exceptions."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
import torch
from tests.guiding import pictured
from tests.rollouts import assert_same_bits
from tests.serving.servers import SMALL, Background, Gate, HookedEngine, serving, until

from flowroll import SamplingParams
from flowroll.client import AsyncClient, Client
from flowroll.engine.plan import RequestPlan
from flowroll.engine.service import EngineService
from flowroll.errors import EngineError, InvalidRequestError, QueueFullError, ShuttingDownError, UnauthorizedError
from flowroll.families import FAMILIES
from flowroll.wire.codec import WireFormat

PARAMS = SamplingParams(**SMALL, num_outputs_per_prompt=2, return_denoising_env=True, return_dit_trajectory=True)


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_through_the_client_have_the_bits_of_the_engine(
    service_of: Callable[[str], EngineService], family: str, wire_format: WireFormat
) -> None:
    served = service_of(family)
    with serving(served) as http, Client(str(http.base_url), wire_format=wire_format) as client:
        received = client.rollout(replace(PARAMS, **pictured(family, {})))
    for ours, theirs in zip(served.engine.rollout(PARAMS), received, strict=True):
        assert_same_bits(ours, theirs)


def test_images_through_the_client_have_the_bits_of_the_engine(server: httpx.Client, service: EngineService) -> None:
    with Client(str(server.base_url)) as client:
        (received,) = client.generate(**SMALL)
    (expected,) = service.engine.generate(**SMALL)
    assert torch.equal(received.image, expected.image) and torch.equal(received.latents, expected.latents)
    assert received.sampling == expected.sampling


def test_the_clients_status_calls_find_their_routes(server: httpx.Client, service: EngineService) -> None:
    with Client(str(server.base_url)) as client:
        client.wait_ready(5)
        assert client.health() == {"status": "ok", "is_asleep": False}
        assert client.server_info()["family"] == "qwen_image"
        assert client.models()[0]["object"] == "model"
        assert "flowroll_queue_depth" in client.metrics()


def test_asynchronous_clients_share_a_server(server: httpx.Client, service: EngineService) -> None:
    async def two() -> list[int]:
        async with AsyncClient(str(server.base_url)) as client:
            answers = await asyncio.gather(*(client.rollout(**{**SMALL, "seed": seed}) for seed in (1, 2)))
        return [rollout.seed for (rollout,) in answers]

    assert asyncio.run(two()) == [1, 2]


def test_the_client_raises_what_the_server_raised(hooked: HookedEngine) -> None:
    def fail(plan: RequestPlan) -> None:
        raise RuntimeError("no device")

    with EngineService(hooked, max_queue=0) as service, serving(service) as http, Client(str(http.base_url)) as client:
        with pytest.raises(InvalidRequestError, match="use 96 or 112") as refused:
            client.rollout(**{**SMALL, "height": 100})
        assert refused.value.field == "height"
        hooked.hook = fail
        with pytest.raises(EngineError, match="no device"):
            client.rollout(**SMALL)
        hooked.hook = gate = Gate()
        running = Background(lambda: http.post("/generate", json=SMALL))
        until(lambda: service.status().counts.running == 1)
        with pytest.raises(QueueFullError) as full:
            client.rollout(**SMALL)
        assert full.value.retry_after_s >= 1
        gate.opened.set()
        running.answer()
        service.drain()
        with pytest.raises(ShuttingDownError):
            client.rollout(**SMALL)


def test_the_client_sends_its_token(service: EngineService) -> None:
    with serving(service, api_key="s3cret") as http:
        with Client(str(http.base_url), api_key="s3cret") as client:
            client.wait_ready(5)
        with Client(str(http.base_url)) as stranger, pytest.raises(UnauthorizedError):
            stranger.rollout(**SMALL)
