"""LoRA adapters over HTTP: loaded, chosen per request, swapped, unloaded; and who may have what read."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from safetensors.torch import load_file, save
from tests.adapters import policy, saved
from tests.rollouts import assert_same_bits
from tests.serving.servers import SMALL, WAIT_S, Background, error_of, read_answer, serving, until
from tests.weights import REQUEST

from flowroll import replay
from flowroll.client import AsyncClient, Client
from flowroll.client.calls import UpdateMode
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import ForbiddenError, InvalidRequestError, WeightsRejectedError


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def root(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("old", "new")):
        saved(policy(engine._model.transformer, seed), root / name)
    outside = saved(policy(engine._model.transformer), tmp_path_factory.mktemp("outside") / "adapter")
    (root / "link-out").symlink_to(outside)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copytree(root / "old", root / name)
        (root / name / name).unlink()
        (root / name / name).symlink_to(outside / name)
    return root


@pytest.fixture(scope="module")
def server(engine: Engine, root: Path) -> Iterator[httpx.Client]:
    with EngineService(engine, max_queue=4) as service, serving(service, weights_roots=(str(root),)) as client:
        yield client


@pytest.fixture
def client(server: httpx.Client) -> Iterator[Client]:
    """Of a server without adapters."""
    with Client(str(server.base_url)) as client:
        yield client
        for adapter in client.lora_adapters():
            client.unload_lora_adapter(adapter.name)


@pytest.mark.parametrize("merged", [False, True])
def test_an_old_and_a_new_policy_are_rolled_out_and_scored_beside_the_model(
    client: Client, engine: Engine, root: Path, merged: bool
) -> None:
    (base,) = client.rollout(**REQUEST)
    loaded = [client.load_lora_adapter(root / name, name=name, merged=merged).adapter for name in ("old", "new")]
    assert client.lora_adapters() == loaded == list(engine.lora_adapters())
    rollouts = [client.rollout(**REQUEST, lora_name=name)[0] for name in ("old", "new")]
    assert [rollout.sampling.lora for rollout in rollouts] == [adapter.record for adapter in loaded]
    assert {rollout.weight_version for rollout in rollouts} == {client.server_info()["weight_version"]}
    for rollout in (base, *rollouts):
        name = rollout.sampling.lora.name if rollout.sampling.lora else None
        assert_same_bits(engine.rollout(**REQUEST, lora_name=name)[0], rollout)
    scores = client.score([base, *rollouts])
    recorded = torch.stack([rollout.log_probs for rollout in (base, *rollouts)])
    assert torch.equal(scores.log_probs, recorded)
    for rollout, velocities in zip((base, *rollouts), scores.velocities, strict=True):
        assert torch.equal(velocities, rollout.debug_tensors.model_output)
    # The same states under another policy: a record that names it.
    reference = replace(rollouts[1], sampling=replace(rollouts[1].sampling, lora=None))
    others = client.score([reference])
    assert not torch.equal(others.log_probs, recorded[2:])
    assert torch.equal(others.log_probs, replay.score(engine._model.transformer, [reference]).log_probs.detach())


def test_a_swap_and_an_unload_have_versions(client: Client, root: Path) -> None:
    client.load_lora_adapter(root / "old", name="p", weight_version="120")
    swapped = client.load_lora_adapter(root / "new", name="p")
    assert (swapped.previous_version, swapped.weight_version) == ("120", "121")
    assert swapped.paused_s < swapped.read_s + swapped.paused_s
    (rollout,) = client.rollout(**REQUEST, lora_name="p", min_weight_version="121")
    assert rollout.sampling.lora.version == "121"
    gone = client.unload_lora_adapter("p", weight_version="122")
    assert (gone.adapter, gone.weight_version) == (None, "122")
    with pytest.raises(InvalidRequestError, match="lora_name must be a loaded adapter") as refused:
        client.rollout(**REQUEST, lora_name="p")
    assert refused.value.field == "lora_name"
    with pytest.raises(InvalidRequestError) as refused:
        client.score([rollout])
    assert refused.value.field == "samples[0].sampling.lora_name"
    with pytest.raises(InvalidRequestError):
        client.unload_lora_adapter("p")


@pytest.mark.parametrize(("change", "mode"), [("load", "drain"), ("load", "abort"), ("send", "abort"), ("unload", "abort")])
def test_a_change_lets_running_requests_finish_or_has_them_done_again(
    change: str, mode: UpdateMode, client: Client, server: httpx.Client, engine: Engine, root: Path
) -> None:
    client.load_lora_adapter(root / "old", name="p", weight_version="before")
    trainer = policy(engine._model.transformer, 1)
    tensors, config = peft.get_peft_model_state_dict(trainer), trainer.peft_config["default"].to_dict()
    options: dict[str, Any] = {"name": "p", "weight_version": "after", "mode": mode}
    body = {**SMALL, "num_inference_steps": 150, "rollout_debug_mode": False}
    running = Background(lambda: server.post("/rollout/generate", json=body))
    until(lambda: client.server_info()["queue"]["running"] == 1)
    if change == "load":
        client.load_lora_adapter(root / "new", **options)
    elif change == "send":
        client.load_lora_adapter_from_tensors(tensors, config, **options)
    else:
        client.unload_lora_adapter(**options)
    assert running.answer().json()[0]["weight_version"] == ("before" if mode == "drain" else "after")


def test_changes_are_counted_as_updates_of_weights(client: Client, root: Path) -> None:
    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    done, failed = (f'flowroll_weight_updates_total{{outcome="{outcome}"}}' for outcome in ("completed", "failed"))
    before = value(done), value(failed), value("flowroll_weight_pause_seconds_total")
    client.load_lora_adapter(root / "old", name="p")
    assert (value(done), value(failed)) == (before[0] + 1, before[1])
    paused_s = value("flowroll_weight_pause_seconds_total")
    assert paused_s > before[2]
    client.unload_lora_adapter("p")
    assert value("flowroll_weight_pause_seconds_total") > paused_s
    with pytest.raises(InvalidRequestError):
        client.unload_lora_adapter("p")
    assert (value(done), value(failed)) == (before[0] + 2, before[1] + 1)


def test_the_asynchronous_client_does_the_same(client: Client, server: httpx.Client, root: Path) -> None:
    async def run() -> None:
        async with AsyncClient(str(server.base_url)) as other:
            change = await other.load_lora_adapter(root / "old", name="p", merged=True, mode="abort")
            assert await other.lora_adapters() == [change.adapter]
            assert (await other.unload_lora_adapter("p", mode="abort")).adapter is None

    asyncio.run(run())


@pytest.mark.parametrize("path", ["link-out", "adapter_config.json", "adapter_model.safetensors", "..", "../x"])
def test_no_path_leads_out_of_the_roots(path: str, client: Client, root: Path) -> None:
    with pytest.raises(ForbiddenError, match="lora_path must lead into a folder of --weights-root") as refused:
        client.load_lora_adapter(root / path, name="p")
    assert refused.value.field == "lora_path"


def test_a_refused_adapter_is_a_422_and_changes_nothing(client: Client, root: Path) -> None:
    version = client.server_info()["weight_version"]
    with pytest.raises(WeightsRejectedError, match=r"must hold adapter_config.json, got none"):
        client.load_lora_adapter(root, name="p")
    assert (client.server_info()["weight_version"], client.lora_adapters()) == (version, [])


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("load", {"lora_path": "/x"}, "lora_name"),
        ("load", {"lora_name": "p"}, "lora_path"),
        ("load", {"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ("load", {"lora_name": "a\nb", "lora_path": "/x"}, "lora_name"),
        ("load", {"lora_name": "p", "lora_path": "x"}, "lora_path"),
        ("load", {"lora_name": "p", "lora_path": "/x", "merged": 1}, "merged"),
        ("load", {"lora_name": "p", "lora_path": "/x", "strength": 1}, "strength"),
        ("load", {"lora_name": "p", "lora_path": "/x", "weight_version": "a\nb"}, "weight_version"),
        ("load", {"lora_name": "p", "lora_path": "/x", "mode": "now"}, "mode"),
        ("unload", {}, "lora_name"),
        ("unload", {"lora_name": "p", "mode": "now"}, "mode"),
        ("unload", {"lora_name": "p"}, "lora_name"),
    ],
)
def test_bad_requests_are_refused_by_name(server: httpx.Client, route: str, body: dict[str, Any], field: str) -> None:
    answer = server.post(f"/{route}_lora_adapter", json=body)
    assert (answer.status_code, error_of(answer)["field"]) == (422, field)


def test_an_unknown_adapter_is_a_422_of_the_request(server: httpx.Client) -> None:
    for body in ({**SMALL, "lora_name": "q"}, {**SMALL, "extra_sampling_params": {"lora_name": "q"}}):
        answer = server.post("/rollout/generate", json=body)
        assert answer.status_code == 422 and error_of(answer)["field"].endswith("lora_name")


def test_an_adapter_from_tensors_is_the_one_from_disk(client: Client, engine: Engine, root: Path) -> None:
    trainer = policy(engine._model.transformer, 1)
    tensors, config = peft.get_peft_model_state_dict(trainer), trainer.peft_config["default"].to_dict()
    sent = client.load_lora_adapter_from_tensors(tensors, config, name="sent", merged=True, weight_version="300")
    own = engine.load_lora_adapter_from_tensors(tensors, config, name="own")
    disk = client.load_lora_adapter(root / "new", name="disk", merged=True)
    assert sent.weight_version == "300" and sent.adapter.merged and not own.adapter.merged
    assert sent.adapter.sha256 == own.adapter.sha256 == disk.adapter.sha256 == replay.adapter_checksum(trainer)
    (one,), (other,) = (client.rollout(**REQUEST, lora_name=name) for name in ("sent", "disk"))
    assert torch.equal(one.debug_tensors.model_output, other.debug_tensors.model_output)


@pytest.mark.parametrize(
    ("query", "edit", "words"),
    [
        ({}, {}, "lora_name"),
        ({"lora_name": "p", "merged": "yes"}, {}, "merged"),
        ({"lora_name": "p"}, {"metadata": None}, "must carry adapter_config in its metadata"),
        ({"lora_name": "p"}, {"metadata": {"adapter_config": "[1"}}, "^adapter_config.json must be JSON"),
        ({"lora_name": "p"}, {"metadata": {"adapter_config": "[1]"}}, "^adapter_config.json must hold an object"),
        ({"lora_name": "p"}, {"metadata": {"adapter_config": f'{{"peft_type": {"1" * 5000}}}'}}, "must be JSON"),
        ({"lora_name": "p"}, {"cut": 4}, "got 4 bytes too few"),
    ],
)
def test_a_bad_body_is_a_422_and_leaves_nothing(
    query: dict[str, str], edit: dict[str, Any], words: str, server: httpx.Client, root: Path
) -> None:
    metadata = edit.get("metadata", {"adapter_config": (root / "old" / "adapter_config.json").read_text()})
    body = save(load_file(root / "old" / "adapter_model.safetensors"), metadata)
    body = body[: len(body) - edit.get("cut", 0)]
    headers = {"content-type": "application/octet-stream"}
    answer = server.post("/load_lora_adapter_from_tensors", params=query, content=body, headers=headers)
    assert answer.status_code == 422 and re.search(words, error_of(answer)["message"])
    assert tempfile.gettempdir() not in answer.text
    assert server.get("/lora_adapters").json() == {"adapters": []}


def test_a_body_is_refused_by_its_header_before_its_data_has_come_and_leaves_no_file(server: httpx.Client, root: Path) -> None:
    config = (root / "old" / "adapter_config.json").read_text()
    body = save({"no.such.lora_A.weight": torch.zeros(64, 2**16)}, {"adapter_config": config})
    size = 8 + int.from_bytes(body[:8], "little")
    head = (
        f"POST /load_lora_adapter_from_tensors?lora_name=p HTTP/1.1\r\nHost: {server.base_url.netloc.decode()}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    files = set(os.listdir(tempfile.gettempdir()))
    with socket.create_connection((server.base_url.host, server.base_url.port or 80), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + body[:size])
        assert set(os.listdir(tempfile.gettempdir())) <= files
        # As much as the server takes to look at the header: the rest never comes.
        with contextlib.suppress(ConnectionError):
            connection.sendall(body[size : size + 4 * 2**20])
        status, answer = read_answer(connection)
    assert status == 422 and b"others: no.such.lora_A.weight" in answer
    assert set(os.listdir(tempfile.gettempdir())) <= files


def test_bodies_are_read_one_at_a_time_and_those_that_wait_are_bounded(engine: Engine, root: Path) -> None:
    config = (root / "old" / "adapter_config.json").read_text()
    body = save(load_file(root / "old" / "adapter_model.safetensors"), {"adapter_config": config})
    begun, held = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield body[:100]
        begun.set()
        held.wait(WAIT_S)
        yield body[100:]

    headers = {"content-type": "application/octet-stream"}
    with serving(EngineService(engine, max_queue=4), max_control_queue=2) as server:
        url = f"{server.base_url}/load_lora_adapter_from_tensors"

        def send(content: Any, name: str) -> Background:
            return Background(
                lambda: httpx.post(url, params={"lora_name": name}, content=content, headers=headers, timeout=WAIT_S)
            )

        slow = send(slowly(), "slow")
        assert begun.wait(WAIT_S)
        others = [send(body, f"other {number}") for number in range(3)]
        until(lambda: sum(one._answer is not None and one._answer.status_code == 429 for one in others) == 2)
        # A slow body holds up other bodies, and no change.
        time.sleep(1.0)
        assert sum(one._answer is not None for one in others) == 2
        assert server.post("/resume_memory_occupation", timeout=WAIT_S).status_code == 200
        held.set()
        assert slow.answer().status_code == 200
        assert sorted(one.answer().status_code for one in others) == [200, 429, 429]
        for adapter in server.get("/lora_adapters").json()["adapters"]:
            server.post("/unload_lora_adapter", json={"lora_name": adapter["name"]}).raise_for_status()
