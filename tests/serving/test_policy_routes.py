"""Policies over HTTP: copied, averaged, chosen by requests, dropped; by clients and by plain bodies."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tests.serving.servers import SMALL, error_of, serving
from tests.weights import REQUEST

from flowroll.client import AsyncClient, Client
from flowroll.engine import AdapterLimits, Engine
from flowroll.engine.service import EngineService
from flowroll.types import Policy


@pytest.fixture(scope="module")
def server(z_image_checkpoint: Path) -> Iterator[httpx.Client]:
    limits = AdapterLimits(max_policies=1)
    with (
        Engine(z_image_checkpoint, device="cpu", adapter_limits=limits) as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service) as client,
    ):
        yield client


@pytest.fixture
def client(server: httpx.Client) -> Iterator[Client]:
    with Client(str(server.base_url)) as client:
        yield client
        for policy in client.policies():
            client.drop_policy(policy.name)


def test_an_old_policy_is_rolled_out_after_its_weights_were_replaced(
    client: Client,
) -> None:
    (before,) = client.rollout(**REQUEST)
    made = client.copy_policy("old behavior").policy
    assert client.policies() == [made] and (made.kind, made.num_updates, made.decay) == ("weights", 1, None)
    changed = {"all_x_embedder.2-1.bias": torch.ones(64)}
    version = client.update_weights(changed, partial=True).weight_version
    (now,) = client.rollout(**REQUEST)
    (old,) = client.rollout(**REQUEST, policy="old behavior")
    assert torch.equal(old.image, before.image) and not torch.equal(now.image, before.image)
    assert old.sampling.policy == made.record and old.weight_version == before.weight_version != version
    scores = client.score([old, now], policy="old behavior")
    assert torch.equal(scores.log_probs[0], old.log_probs) and not torch.equal(scores.log_probs[1], now.log_probs)
    assert (scores.policy, scores.weight_version) == (made.record, before.weight_version)
    assert torch.equal(client.score([now], policy="default").log_probs[0], now.log_probs)
    # Plain generation of a moving average, too.
    averaged = client.average_policy("old behavior", decay=0).policy
    assert (averaged.decay, averaged.weight_version, averaged.num_updates) == (0, version, 2)
    images = [
        client.generate(
            **{key: value for key, value in REQUEST.items() if "return" not in key and key != "debug_mode"}, policy=name
        )
        for name in ("old behavior", "default")
    ]
    assert torch.equal(images[0][0].image, images[1][0].image)


def test_the_async_client_and_plain_bodies_do_the_same(client: Client, server: httpx.Client) -> None:
    async def use() -> list[Policy]:
        async with AsyncClient(str(server.base_url)) as other:
            await other.average_policy("ema", decay=0.5)
            await other.average_policy("ema", decay=0.5, source="ema", mode="abort")
            return await other.policies()

    (policy,) = asyncio.run(use())
    assert (policy.num_updates, policy.decay) == (2, 0.5)
    assert server.get("/policies").json()["policies"][0]["name"] == "ema"
    copied = server.post("/policies/ema/copy")
    assert copied.json()["message"].startswith("ema follows version") and copied.json()["policy"]["num_updates"] == 3
    answer = server.post("/rollout/generate", json={**SMALL, "policy": "ema"})
    assert answer.json()[0]["sampling"]["policy"]["name"] == "ema"
    assert server.post("/policies/ema/drop", json={"mode": "drain"}).json()["policy"] is None


@pytest.mark.parametrize(
    ("path", "body", "field", "words"),
    [
        ("/policies/ema/ema", {}, "decay", "decay must be"),
        ("/policies/ema/ema", {"decay": 2}, "decay", "decay must be a number from 0 to 1, got 2"),
        ("/policies/ema/ema", {"decay": "0.5"}, "decay", "decay must be"),
        ("/policies/ema/copy", {"source": "no"}, "source", "source must be one of default"),
        ("/policies/ema/copy", {"sauce": "no"}, "sauce", "sauce"),
        ("/policies/default/copy", {}, "policy", "policy must have a name that nothing else has"),
        ("/policies/%00/copy", {}, "name", "name must be printable text"),
        ("/policies/no/drop", {}, "policy", "policy must be one of default"),
        ("/rollout/generate", {**SMALL, "policy": "no"}, "policy", "policy must be one of default, got no"),
        ("/rollout/generate", {**SMALL, "policy": ""}, "policy", "policy must"),
    ],
)
def test_what_is_wrong_is_a_422_that_names_the_remedy(
    server: httpx.Client, path: str, body: dict[str, object], field: str, words: str
) -> None:
    answer = server.post(path, json=body)
    error = error_of(answer)
    assert (answer.status_code, error["field"]) == (422, field), answer.text
    assert words in error["message"]
    assert server.get("/policies").json() == {"policies": []}
