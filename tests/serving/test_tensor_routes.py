"""New weights as safetensors bodies: all of them or none, whoever breaks off where."""

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save
from tests.rollouts import assert_same_bits
from tests.serving.servers import WAIT_S, Background, Gate, HookedEngine, error_of, serving, until
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.client import AsyncClient, Client
from flowroll.client.pushing import buckets_of
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.versions import VersionState
from flowroll.errors import (
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    WeightsBusyError,
    WeightsRejectedError,
)
from flowroll.serving import uploads

OCTETS = {"content-type": "application/octet-stream"}
ONE_BODY = "/update_weights_from_safetensors"


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with another transformer; read only."""
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


@pytest.fixture(scope="module")
def tensors(other: Path) -> dict[str, Tensor]:
    """New weights."""
    return load_file(other / "transformer" / WEIGHTS)


@pytest.fixture(scope="module")
def expected(other: Path) -> tuple[Rollout, str]:
    """What an engine answers that was started on them, and its checksum."""
    with Engine(other, device="cpu") as fresh:
        return fresh.rollout(**REQUEST)[0], fresh.weights_checksum()


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[HookedEngine]:
    with HookedEngine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: HookedEngine) -> Iterator[EngineService]:
    with EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[Client]:
    with Client(str(server.base_url)) as client:
        yield client


@pytest.fixture
def untouched(client: Client, z_image_checkpoint: Path) -> Iterator[None]:
    """For a test after which weights, version, checksum and the next rollout are what they were."""
    client.update_weights(load_file(z_image_checkpoint / "transformer" / WEIGHTS))
    (old,) = client.rollout(**REQUEST)
    checksum = client.weights_checksum()
    yield
    (new,) = client.rollout(**REQUEST)
    assert_same_bits(new, old)
    assert client.weights_checksum() == checksum
    assert client.server_info()["weight_version"] == new.weight_version == old.weight_version


def halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    items = list(tensors.items())
    return [dict(items[::2]), dict(items[1::2])]


def begin(server: httpx.Client, **body: Any) -> str:
    answer = server.post("/weights/begin", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["update_id"]


def free(server: httpx.Client) -> None:
    """Waits until no update is under way."""
    answers: list[httpx.Response] = []
    until(lambda: not answers.append(server.post("/weights/begin")) and answers[-1].status_code == 200)
    assert server.post(f"/weights/{answers[-1].json()['update_id']}/abort").status_code == 200


def put(server: httpx.Client, update_id: str, data: bytes) -> httpx.Response:
    return server.post(f"/weights/{update_id}/buckets", content=data, headers=OCTETS)


@pytest.mark.parametrize("bucket_bytes", [1, 10**5, 10**9])
def test_pushed_weights_give_the_rollouts_of_an_engine_started_on_them(
    bucket_bytes: int,
    client: Client,
    z_image_checkpoint: Path,
    tensors: dict[str, Tensor],
    expected: tuple[Rollout, str],
) -> None:
    client.update_weights(load_file(z_image_checkpoint / "transformer" / WEIGHTS))
    (old,) = client.rollout(**REQUEST)
    # As a trainer gathers them: one after the other, some on strides of their own.
    given = ((name, tensor.t().contiguous().t() if tensor.ndim == 2 else tensor) for name, tensor in tensors.items())
    update = client.update_weights(given, weight_version=f"step-{bucket_bytes}", bucket_bytes=bucket_bytes)
    assert (update.previous_version, update.num_tensors) == (old.weight_version, 73)
    (new,) = client.rollout(**REQUEST)
    assert_same_bits(new, expected[0])
    assert not torch.equal(new.dit_trajectory.latents, old.dit_trajectory.latents)
    assert client.weights_checksum() == expected[1] and new.weight_version == f"step-{bucket_bytes}"


def test_the_asynchronous_client_does_the_same(
    client: Client, server: httpx.Client, tensors: dict[str, Tensor], expected: tuple[Rollout, str]
) -> None:
    async def run() -> str:
        async with AsyncClient(str(server.base_url)) as other:
            update = await other.update_weights(tensors, bucket_bytes=10**5, mode="abort")
            with pytest.raises(WeightsRejectedError, match=r"no\.such"):
                await other.update_weights({"no.such": torch.zeros(3)})
            return update.weight_version

    assert asyncio.run(run()) == client.server_info()["weight_version"]
    assert client.weights_checksum() == expected[1]


def test_one_body_is_enough(
    server: httpx.Client, client: Client, tensors: dict[str, Tensor], expected: tuple[Any, str]
) -> None:
    answer = server.post(ONE_BODY, params={"weight_version": "9"}, content=save(tensors), headers=OCTETS)
    assert answer.status_code == 200 and answer.json()["message"].startswith("transformer is of version 9, was of")
    assert client.weights_checksum() == expected[1]
    vae = load_file(Path(client.server_info()["model"]) / "vae" / WEIGHTS)
    answer = server.post(ONE_BODY, params={"module": "vae", "mode": "abort"}, content=save(vae), headers=OCTETS)
    assert answer.json()["module"] == "vae" and answer.json()["weight_version"] == "10"


def test_a_bucket_that_is_refused_may_be_sent_again_and_the_commit_tells_what_is_missing(
    server: httpx.Client, client: Client, tensors: dict[str, Tensor], expected: tuple[Any, str], untouched: None
) -> None:
    first, second = halves(tensors)
    update_id = begin(server)
    assert put(server, update_id, save(first)).json() == {
        "update_id": update_id,
        "module": "transformer",
        "num_arrived": 37,
        "num_tensors": 73,
    }
    wrong = {**second, "cap_embedder.1.bias": torch.zeros(3)}
    name = next(iter(first))
    for data, words in (
        (save(wrong), "hold cap_embedder.1.bias as"),
        (save(second)[:-4], "4 bytes too few"),
        (save(second) + b"....", "more bytes"),
        (b"{}", "no whole header"),
        (save({name: first[name]}), f"got {name} twice"),
        (save({"a.b": torch.zeros(3)}), "got others: a.b"),
    ):
        answer = put(server, update_id, data)
        assert (answer.status_code, error_of(answer)["code"]) == (422, "weights_rejected")
        assert re.search(words, error_of(answer)["message"])
    answer = server.post(f"/weights/{update_id}/commit")
    assert answer.status_code == 422 and re.search("got none for .* and 16 more; send the rest", error_of(answer)["message"])
    assert put(server, update_id, save(second)).status_code == 200
    assert server.post(f"/weights/{update_id}/abort").json() == {"update_id": update_id}
    for path in ("commit", "abort"):
        answer = server.post(f"/weights/{update_id}/{path}")
        assert (answer.status_code, error_of(answer)["field"]) == (404, "update_id")


@pytest.mark.parametrize("where", ["the first bucket", "the last bucket", "one body"])
def test_a_push_that_fails_anywhere_leaves_everything_and_the_way_free(
    where: str, server: httpx.Client, client: Client, tensors: dict[str, Tensor], untouched: None
) -> None:
    names = list(tensors)
    name = names[0] if where == "the first bucket" else names[-1]
    wrong = {**tensors, name: torch.zeros(7)}
    if where == "one body":
        answer = server.post(ONE_BODY, content=save(wrong), headers=OCTETS)
        assert answer.status_code == 422 and name in error_of(answer)["message"]
    else:
        with pytest.raises(WeightsRejectedError, match=name):
            client.update_weights(wrong, bucket_bytes=10**5)
    # A generator that fails in the middle: the trainer's own error.
    with pytest.raises(ZeroDivisionError):
        client.update_weights((pair for pair in tensors.items() if 1 // (pair[0] != names[40])), bucket_bytes=10**5)
    with pytest.raises(WeightsRejectedError, match="got none for"):
        client.update_weights(list(tensors.items())[:-1])
    server.post(f"/weights/{begin(server)}/abort")


def test_an_update_that_is_aborted_leaves_nothing_with_the_engine(server: httpx.Client, service: EngineService) -> None:
    update_id = begin(server)
    assert service.is_open(update_id)
    assert server.post(f"/weights/{update_id}/abort").status_code == 200
    until(lambda: not service.is_open(update_id))


def test_a_commit_that_cannot_be_made_ready_ends_its_update(
    server: httpx.Client, tensors: dict[str, Tensor], untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Tensor:
        raise MemoryError("no room")

    update_id = begin(server, partial=True)
    name = min(tensors)
    assert put(server, update_id, save({name: tensors[name]})).status_code == 200
    with monkeypatch.context() as patched:
        patched.setattr(WeightReceiver, "_own_part", full)
        answer = server.post(f"/weights/{update_id}/commit")
    assert (answer.status_code, error_of(answer)["code"]) == (422, "weights_rejected")
    # Nothing more can come of it, so it is in nobody's way.
    server.post(f"/weights/{begin(server)}/abort")


def test_an_exchange_that_fails_leaves_everything(
    client: Client, engine: HookedEngine, tensors: dict[str, Tensor], untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(state: VersionState, version: str) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(VersionState, "after", fail)
        with pytest.raises(Exception, match="no memory left"):
            client.update_weights(tensors)


def test_one_update_at_a_time(server: httpx.Client, client: Client, tensors: dict[str, Tensor], untouched: None) -> None:
    update_id = begin(server)
    with pytest.raises(WeightsBusyError, match=update_id):
        client.update_weights(tensors)
    answer = server.post(ONE_BODY, content=save(tensors), headers=OCTETS)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "weights_busy")
    assert server.post(f"/weights/{update_id}/abort").status_code == 200


def _open(server: httpx.Client, path: str, length: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(server.base_url.host, server.base_url.port, timeout=WAIT_S)
    connection.putrequest("POST", path)
    connection.putheader("content-type", OCTETS["content-type"])
    connection.putheader("content-length", str(length))
    connection.endheaders()
    return connection


@pytest.mark.parametrize("path", ["/weights/{update_id}/buckets", ONE_BODY])
def test_a_trainer_that_is_killed_leaves_everything(
    path: str,
    server: httpx.Client,
    client: Client,
    engine: HookedEngine,
    tensors: dict[str, Tensor],
    untouched: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So that part of the data is taken before the trainer dies.
    monkeypatch.setattr(uploads, "_LOT_BYTES", 2**14)
    data = save(tensors)
    update_id = begin(server) if "{" in path else ""
    connection = _open(server, path.format(update_id=update_id), len(data))
    connection.send(data[: len(data) // 2])
    if update_id:
        # The header is there: its names are taken.
        probe = save({**tensors, "no.such": torch.zeros(1)})
        until(lambda: "twice" in error_of(put(server, update_id, probe))["message"])
    # As the kernel does for a process that is killed.
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    if update_id:
        # The rest of the update is still there: the bucket can be sent again.
        until(lambda: put(server, update_id, data).status_code == 200)
        assert server.post(f"/weights/{update_id}/abort").status_code == 200
    else:
        free(server)


def test_an_update_that_falls_silent_is_dropped(service: EngineService, tensors: dict[str, Tensor]) -> None:
    before = service.engine.weight_version, service.engine.weights_checksum()
    data = save(tensors)
    with serving(service, weights_idle_s=0.3) as server:
        update_id = begin(server)
        assert put(server, update_id, save(tensors)).status_code == 200
        free(server)
        assert server.post(f"/weights/{update_id}/commit").status_code == 404
        # Half a body, and a trainer that hangs.
        connection = _open(server, ONE_BODY, len(data))
        connection.send(data[: len(data) // 2])
        answer = connection.getresponse()
        assert answer.status == 422
        assert "without a pause of 0.3 s" in json.loads(answer.read())["error"]["message"]
        connection.close()
        assert server.post(f"/weights/{begin(server)}/abort").status_code == 200
        # One that goes on is not: it sends for longer than the pause that is allowed.
        update_id = begin(server)
        for half in halves(tensors):
            time.sleep(0.2)
            assert put(server, update_id, save(half)).status_code == 200
        assert server.post(f"/weights/{update_id}/abort").status_code == 200
    assert (service.engine.weight_version, service.engine.weights_checksum()) == before


def test_a_commit_that_waits_for_requests_is_no_silence(
    service: EngineService, engine: HookedEngine, tensors: dict[str, Tensor]
) -> None:
    with serving(service, weights_idle_s=0.2) as server:
        engine.hook = gate = Gate()
        try:
            running = Background(lambda: server.post("/rollout/generate", json={"prompt": "a", "num_inference_steps": 1}))
            assert gate.entered.wait(WAIT_S)
            update_id = begin(server, weight_version="late")
            assert put(server, update_id, save(tensors)).status_code == 200
            commit = Background(lambda: server.post(f"/weights/{update_id}/commit"))
            commit._thread.join(0.6)
            answer = server.post("/weights/begin")
            assert (answer.status_code, error_of(answer)["code"]) == (409, "weights_busy")
            # Nobody is told that the weights stay while they are about to change.
            answer = server.post(f"/weights/{update_id}/abort")
            assert (answer.status_code, error_of(answer)["code"]) == (409, "weights_busy")
            assert "got a commit under way; wait for its answer" in error_of(answer)["message"]
            gate.opened.set()
            assert running.answer().json()[0]["weight_version"] != "late"
            assert commit.answer().json()["weight_version"] == "late"
        finally:
            engine.hook = lambda plan: None


def test_requests_go_on_while_tensors_arrive(server: httpx.Client, client: Client, tensors: dict[str, Tensor]) -> None:
    version = client.server_info()["weight_version"]
    data = save(tensors)
    connection = _open(server, ONE_BODY, len(data))
    connection.send(data[: len(data) // 2])
    assert client.rollout(**REQUEST)[0].weight_version == version
    connection.send(data[len(data) // 2 :])
    assert connection.getresponse().status == 200
    connection.close()


def test_bad_requests_are_refused_by_name(server: httpx.Client, tensors: dict[str, Tensor], untouched: None) -> None:
    for body, field in (
        ({"module": "text_encoder"}, "module"),
        ({"weight_version": ""}, "weight_version"),
        ({"weight_version": "a\nb"}, "weight_version"),
        ({"partial": 1}, "partial"),
        ({"modules": "vae"}, "modules"),
    ):
        answer = server.post("/weights/begin", json=body)
        assert (answer.status_code, error_of(answer)["field"]) == (422, field)
    for query, field in (({"module": "x"}, "module"), ({"mode": "now"}, "mode"), ({"a": "b"}, "a")):
        answer = server.post(ONE_BODY, params=query, content=save(tensors), headers=OCTETS)
        assert (answer.status_code, error_of(answer)["field"]) == (422, field)
    update_id = begin(server)
    assert error_of(server.post(f"/weights/{update_id}/commit", json={"mode": "later"}))["field"] == "mode"
    assert server.post(f"/weights/{update_id}/buckets", json={}).status_code == 415
    headers = {**OCTETS, "content-encoding": "gzip"}
    assert server.post(f"/weights/{update_id}/buckets", content=b"x", headers=headers).status_code == 415
    server.post(f"/weights/{update_id}/abort")


def test_a_body_is_limited_whether_it_tells_its_length_or_not(service: EngineService, tensors: dict[str, Tensor]) -> None:
    data = save(tensors)
    with serving(service, max_weights_body_bytes=len(data) // 2) as server:
        with Client(str(server.base_url)) as client:
            with pytest.raises(PayloadTooLargeError):
                client.update_weights(tensors)
            client.update_weights(tensors, bucket_bytes=10**6)
        for content in (data, (data[start : start + 10**5] for start in range(0, len(data), 10**5))):
            answer = server.post(ONE_BODY, content=content, headers=OCTETS)
            assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")
        free(server)


def test_the_token_guards_them(service: EngineService) -> None:
    with serving(service, api_key="s3cret") as client:
        for path in ("/weights/begin", "/weights/x/buckets", "/weights/x/commit", "/weights/x/abort", ONE_BODY):
            assert client.post(path).status_code == 401


def test_the_clients_buckets_hold_every_tensor_once_in_order(tensors: dict[str, Tensor]) -> None:
    buckets = list(buckets_of(tensors, 10**5))
    assert len(buckets) > 3 and [name for bucket in buckets for name in bucket] == list(tensors)
    for bucket in buckets:
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket.values()) <= 10**5
    with pytest.raises(InvalidRequestError, match="x twice"):
        list(buckets_of([("x", torch.zeros(1))] * 2, 10**5))
    with pytest.raises(InvalidRequestError):
        list(buckets_of(tensors, 0))


def test_an_update_that_ended_is_not_found(client: Client) -> None:
    from flowroll.client import pushing

    with pytest.raises(NotFoundError):
        client._send(pushing.bucket_call("none", {"x": torch.zeros(1)}))
