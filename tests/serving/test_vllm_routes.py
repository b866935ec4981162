"""vLLM's routes for reinforcement learning: the calls of its own HTTP client, and what its documentation says of them."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tests.rollouts import assert_same_bits
from tests.serving.servers import SMALL, WAIT_S, Background, error_of, serving, until
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flowroll import Client, Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.parallel.broadcasting import BroadcastGroup
from flowroll.wire.vllm import VLLM_GROUP

ROLLOUT = "/rollout/generate"
# What vLLM's own client sent; see tests/data/README.md.
RECORDED = json.loads((Path(__file__).parents[1] / "data/vllm.json").read_text())["calls"]
PACKED = Path(__file__).parents[1] / "data/vllm_packed.safetensors"
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 60, "rollout_debug_mode": False}


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


@pytest.fixture(scope="module")
def new(other: Path) -> tuple[dict[str, Tensor], Rollout, str]:
    """The new weights, what an engine that was started on them makes, and their checksum."""
    with Engine(other, device="cpu") as engine:
        (rollout,) = engine.rollout(**REQUEST)
        return load_file(other / "transformer" / WEIGHTS), rollout, engine.weights_checksum()


@pytest.fixture(scope="module")
def one_service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture
def service(one_service: EngineService, z_image_checkpoint: Path) -> Iterator[EngineService]:
    """It has its first weights again when a test ends."""
    before = one_service.engine.weights_checksum()
    yield one_service
    one_service.resume().result()
    if one_service.engine.weights_checksum() != before:
        one_service.engine.update_weights_from_disk(z_image_checkpoint)


@pytest.fixture(scope="module")
def one_server(one_service: EngineService) -> Iterator[httpx.Client]:
    with serving(one_service, rank_timeout_s=20.0, weights_idle_s=20.0) as client:
        yield client


@pytest.fixture
def server(one_server: httpx.Client, service: EngineService) -> httpx.Client:
    return one_server


class SyncClient:
    """The calls of vLLM's HTTPVLLMWeightSyncClient: paths, and bodies with their nesting; no body is no body."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def _post(self, path: str, json: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._http.post(f"/{path}", json=json)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        return self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> dict[str, Any]:
        return self._post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        return self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> dict[str, Any]:
        return self._post("finish_weight_update", None if weight_version is None else {"weight_version": weight_version})

    def shutdown_weight_transfer_engine(self) -> dict[str, Any]:
        return self._post("shutdown_weight_transfer_engine")


@pytest.mark.parametrize("call", RECORDED, ids=lambda call: call["call"])
def test_the_calls_of_these_tests_are_those_of_vllms_own_client(call: dict[str, Any]) -> None:
    def check(request: httpx.Request) -> httpx.Response:
        body = request.content.decode()
        assert (request.url.path, request.headers.get("content-type")) == (sent["path"], sent["content_type"])
        assert (json.loads(body) if body else "") == (json.loads(sent["body"]) if sent["body"] else "")
        return httpx.Response(200, json={})

    sent = call["sent"]
    with httpx.Client(transport=httpx.MockTransport(check), base_url="http://server.test") as http:
        getattr(SyncClient(http), call["call"])(*call["arguments"])


@contextmanager
def joined(http: httpx.Client, **changes: Any) -> Iterator[BroadcastGroup]:
    """The trainer's end of the group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    world_size = 1 + http.get("/get_world_size").json()["world_size"]
    info = {**RECORDED[0]["arguments"][0], "master_port": port, "world_size": world_size, "backend": "gloo", **changes}
    answers: list[dict[str, Any]] = []
    joining = threading.Thread(target=lambda: answers.append(SyncClient(http).init_weight_transfer_engine(info)))
    store = TCPStore("127.0.0.1", port, world_size, True, wait_for_workers=False)
    joining.start()
    with BroadcastGroup(
        VLLM_GROUP,
        rank=0,
        world_size=world_size,
        backend="gloo",
        address="127.0.0.1",
        port=port,
        device="cpu",
        timeout_s=20.0,
        store=store,
    ) as group:
        joining.join(WAIT_S)
        assert answers == [{"message": "Weight transfer initialized"}]
        yield group


def send(
    http: httpx.Client, group: BroadcastGroup, tensors: dict[str, Tensor], broadcast: list[Tensor] | None = None, **info: Any
) -> None:
    described = {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        **info,
    }
    answers: list[dict[str, Any]] = []
    receiving = threading.Thread(target=lambda: answers.append(SyncClient(http).update_weights(described)))
    receiving.start()
    for tensor in broadcast or tensors.values():
        group.broadcast(tensor)
    receiving.join(WAIT_S)
    assert answers == [{"message": "Weights updated"}]


def halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    items = list(tensors.items())
    return [dict(items[::2]), dict(items[1::2])]


def test_weights_by_the_four_phases_are_those_of_a_fresh_start_and_replay_exactly(
    server: httpx.Client, service: EngineService, other: Path, new: tuple[dict[str, Tensor], Rollout, str]
) -> None:
    tensors, expected, checksum = new
    before = service.engine.weights_checksum()
    sync = SyncClient(server)
    with joined(server) as group:
        assert sync.start_weight_update() == {"message": "Weight update started"}
        for bucket in halves(tensors):
            send(server, group, bucket, packed=False)
            # Nothing is in place before the end.
            assert service.engine.weights_checksum() == before
        assert sync.finish_weight_update(weight_version="12") == {"message": "Weight update finished"}
    assert service.engine.weights_checksum() == checksum
    with Client(str(server.base_url)) as client:
        (rollout,) = client.rollout(**REQUEST)
    assert rollout.weight_version == "12" and server.get("/weight_info").json() == {"weight_version": "12"}
    assert_same_bits(rollout, expected)
    policy = ZImageTransformer2DModel.from_pretrained(other / "transformer")
    replay.align_weights(policy)
    for batch in replay.micro_batches(policy, [rollout], micro_batch=4):
        assert (replay.ratio(batch.log_probs, batch.old_log_probs) == 1).all()


def packed_by_vllm() -> tuple[dict[str, Tensor], list[Tensor], int]:
    """Tensors, what vLLM's own code broadcast for them, and the size of its buffer."""
    with safe_open(PACKED, "pt") as file:
        found = {name: file.get_tensor(name) for name in sorted(file.keys())}
        size = int(file.metadata()["packed_buffer_size_bytes"])
    tensors = {name.split(".", 2)[2]: tensor for name, tensor in found.items() if name.startswith("tensor.")}
    return tensors, [tensor for name, tensor in found.items() if name.startswith("bucket.")], size


@pytest.mark.parametrize("said", ["at the beginning", "in the update", "without a start"])
def test_what_vllms_own_code_packs_is_unpacked_into_the_same_tensors(
    said: str, server: httpx.Client, service: EngineService
) -> None:
    tensors, buckets, size = packed_by_vllm()
    # Several tensors in one, and one that is longer than the buffer.
    assert 1 < len(buckets) < len(tensors) and max(len(bucket) for bucket in buckets) > 2 * size
    sizes = {"packed": True, "packed_buffer_size_bytes": size}
    sync, before = SyncClient(server), service.engine.weights_checksum()
    with joined(server, **(sizes if said == "at the beginning" else {})) as group:
        if said != "without a start":
            sync.start_weight_update()
        send(server, group, tensors, buckets, **({} if said == "at the beginning" else sizes))
        if said != "without a start":
            assert service.engine.weights_checksum() == before
            sync.finish_weight_update()
    weights = service.engine._model.transformer.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype)), name


def test_packed_tensors_of_another_size_are_an_error(server: httpx.Client, service: EngineService) -> None:
    """The bytes that are left over are not taken for other tensors."""
    tensors, buckets, size = packed_by_vllm()
    before = service.engine.weights_checksum()
    update = {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }
    with joined(server, packed=True, packed_buffer_size_bytes=2 * size) as group:
        answering = Background(lambda: server.post("/update_weights", json={"update_info": update}))
        for bucket in buckets:
            with suppress(Exception):
                group.broadcast(bucket)
        assert answering.answer().status_code == 422
    assert service.engine.weights_checksum() == before


def test_the_group_is_left_once_and_again(server: httpx.Client) -> None:
    answer = {"message": "Weight transfer shut down"}
    with joined(server):
        assert SyncClient(server).shutdown_weight_transfer_engine() == answer
    assert SyncClient(server).shutdown_weight_transfer_engine() == answer
    update = {"update_info": {"names": ["x"], "dtype_names": ["float32"], "shapes": [[1]]}}
    assert server.post("/update_weights", json=update).status_code == 404


def test_without_a_start_a_bucket_is_put_in_place_at_once(
    server: httpx.Client, service: EngineService, new: tuple[dict[str, Tensor], Rollout, str]
) -> None:
    with joined(server) as group:
        send(server, group, new[0])
    assert service.engine.weights_checksum() == new[2]


def test_tensors_that_do_not_come_stay_as_they_are(
    server: httpx.Client, service: EngineService, new: tuple[dict[str, Tensor], Rollout, str]
) -> None:
    before = service.engine.weights_checksum()
    with joined(server) as group:
        SyncClient(server).start_weight_update()
        send(server, group, halves(new[0])[0])
        SyncClient(server).finish_weight_update()
    assert service.engine.weights_checksum() not in (before, new[2])


def test_an_update_that_was_not_started_or_is_under_way_is_refused(
    server: httpx.Client, new: tuple[dict[str, Tensor], Rollout, str]
) -> None:
    answer = server.post("/finish_weight_update")
    assert answer.status_code == 404 and "call /start_weight_update first" in error_of(answer)["message"]
    SyncClient(server).start_weight_update()
    assert server.post("/start_weight_update").status_code == 409
    update = {"update_info": {"names": ["x"], "dtype_names": ["float32"], "shapes": [[1]]}}
    # There is no group, or one that has ended.
    assert server.post("/update_weights", json=update).status_code in (404, 422)
    # An update of nothing is none; it goes on, and ends with a tensor.
    assert server.post("/finish_weight_update").status_code == 422
    with joined(server) as group:
        send(server, group, dict(list(new[0].items())[:1]))
        SyncClient(server).finish_weight_update()


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/init_weight_transfer_engine", {}, "init_info"),
        ("/init_weight_transfer_engine", {"init_info": {"master_address": "x"}}, "init_info"),
        (
            "/init_weight_transfer_engine",
            {"init_info": {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 2, "world_size": 2}},
            "init_info.rank_offset",
        ),
        (
            "/init_weight_transfer_engine",
            {"init_info": {**RECORDED[0]["arguments"][0], "packed_buffer_size_bytes": 0}},
            "init_info",
        ),
        ("/init_weight_transfer_engine", {"init_info": {"packed": True}}, "init_info"),
        (
            "/init_weight_transfer_engine",
            {"init_info": {"rank_offset": 1, "world_size": 2, "nccl_unique_id_b64": "AA=="}},
            "init_info",
        ),
        ("/update_weights", {"update_info": {"names": [], "dtype_names": [], "shapes": []}}, "update_info"),
        ("/update_weights", {"update_info": {"ipc_handles_pickled": "gASV"}}, "update_info"),
        ("/start_weight_update", {"draft": True}, "draft"),
        ("/finish_weight_update", {"weight_version": 12}, "weight_version"),
        ("/abort_requests", {"request_ids": [""]}, "request_ids"),
        ("/pause?mode=drain", None, "mode"),
        ("/pause?wait_for_inflight_requests=perhaps", None, "wait_for_inflight_requests"),
    ],
)
def test_what_cannot_be_meant_is_refused(server: httpx.Client, path: str, body: dict[str, Any] | None, field: str) -> None:
    answer = server.post(path, json=body)
    assert answer.status_code == 422, answer.text
    assert error_of(answer)["field"].startswith(field), answer.text
    assert server.get("/is_paused").json() == {"is_paused": False}


def test_a_bucket_with_a_wrong_dtype_names_vllms_field(server: httpx.Client, new: Any) -> None:
    with joined(server):
        update = {"update_info": {"names": ["x"], "dtype_names": ["int99"], "shapes": [[1]]}}
        answer = server.post("/update_weights", json=update)
        assert (answer.status_code, error_of(answer)["field"]) == (422, "update_info.dtype_names")


def start(server: httpx.Client, service: EngineService, **changes: Any) -> Background:
    steps = service.status().load.steps
    running = Background(lambda: server.post(ROLLOUT, json={**LONG, **changes}))
    until(lambda: service.status().load.steps > steps)
    return running


def test_pause_aborts_what_runs_and_new_requests_wait(server: httpx.Client, service: EngineService) -> None:
    running = start(server, service, num_inference_steps=1000)
    assert server.post("/pause").json() == {"status": "paused"}
    assert running.answer().status_code == 499
    assert service.status().load.requests.running == 0
    assert server.get("/is_paused").json() == {"is_paused": True}
    waiting = Background(lambda: server.post(ROLLOUT, json=SMALL))
    until(lambda: service.status().load.requests.pending == 1)
    assert server.post("/resume").json() == {"status": "resumed"}
    assert waiting.answer().status_code == 200
    assert server.get("/is_paused").json() == {"is_paused": False}


@pytest.mark.parametrize(
    "query", [{"mode": "wait"}, {"wait_for_inflight_requests": "true"}, {"mode": "wait", "clear_cache": "True"}]
)
def test_pause_wait_is_answered_when_what_runs_has_finished(
    query: dict[str, str], server: httpx.Client, service: EngineService
) -> None:
    running = start(server, service)
    assert server.post("/pause", params=query).json() == {"status": "paused"}
    assert service.status().load.requests.running == 0
    assert running.answer().status_code == 200
    server.post("/resume")


def test_pause_keep_stops_what_runs_and_resume_goes_on_with_the_same_bits(server: httpx.Client, service: EngineService) -> None:
    body = {**LONG, "rollout_return_dit_trajectory": True}
    alone = server.post(ROLLOUT, json=body).json()
    running = start(server, service, rollout_return_dit_trajectory=True)
    assert server.post("/pause", params={"mode": "keep"}).json() == {"status": "paused"}
    steps = service.status().load.steps
    assert service.status().load.requests.running == 1
    server.post("/resume")
    answer = running.answer()
    assert answer.status_code == 200 and service.status().load.steps > steps
    assert answer.json()[0]["dit_trajectory"]["latents"] == alone[0]["dit_trajectory"]["latents"]


def test_weights_that_come_while_requests_are_kept_are_those_of_the_whole_sample(
    server: httpx.Client, service: EngineService, new: tuple[dict[str, Tensor], Rollout, str]
) -> None:
    """vLLM would go on with other weights in the middle; here the sample is done again from its start."""
    running = start(server, service, rollout_return_dit_trajectory=True)
    server.post("/pause", params={"mode": "keep"})
    with joined(server) as group:
        SyncClient(server).start_weight_update()
        send(server, group, new[0])
        SyncClient(server).finish_weight_update(weight_version="9")
    server.post("/resume")
    (sample,) = running.answer().json()
    (again,) = server.post(ROLLOUT, json={**LONG, "rollout_return_dit_trajectory": True}).json()
    assert sample["weight_version"] == "9"
    assert sample["dit_trajectory"]["latents"] == again["dit_trajectory"]["latents"]


def test_the_older_pause_still_refuses(server: httpx.Client) -> None:
    server.post("/pause", params={"mode": "keep"})
    server.post("/pause_generation")
    assert server.post(ROLLOUT, json=SMALL).status_code == 409
    server.post("/continue_generation")
    assert server.get("/is_paused").json() == {"is_paused": False}


def test_requests_are_aborted_by_their_ids_or_all(server: httpx.Client, service: EngineService) -> None:
    first = start(server, service, request_id="a", num_inference_steps=1000)
    second = start(server, service, request_id="b", num_inference_steps=1000)
    assert server.post("/abort_requests", json={"request_ids": ["a", "nobody"]}).json() == {"status": "aborted", "aborted": 1}
    assert first.answer().status_code == 499
    assert server.post("/abort_requests", json={}).json() == {"status": "aborted", "aborted": 1}
    assert second.answer().status_code == 499


def test_a_server_is_one_member_of_a_group(server: httpx.Client) -> None:
    for query in ({}, {"include_dp": "false"}):
        assert server.get("/get_world_size", params=query).json() == {"world_size": 1}
    assert torch.distributed.is_initialized() is False
