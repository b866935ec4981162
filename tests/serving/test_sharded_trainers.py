"""Pushes from real FSDP2 trainers of several processes: all ranks gather, one sends, all get the same answer or error."""

import copy
import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import torch.distributed as dist
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file
from tests.adapters import policy
from tests.rollouts import assert_same_bits
from tests.serving.servers import serving
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowroll import Rollout, replay
from flowroll.client import Client
from flowroll.client.weight_group import WeightGroup
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import FlowrollError

WORLD = 2


@dataclass(frozen=True)
class Trainer:
    """What one rank of the trainer works with."""

    rank: int
    url: str
    transformer: nn.Module

    def sharded(self, module: nn.Module, shape: tuple[int, ...] = (WORLD,)) -> nn.Module:
        """Sharded over a mesh of this shape; of two dimensions, the first has replicas."""
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        layers = next(block for name, block in module.named_modules() if name.endswith("layers"))
        for block in layers.children():
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)


def _push(trainer: Trainer, named: Callable[[nn.Module], Any], shape: tuple[int, ...] = (WORLD,)) -> dict[str, Any]:
    model = trainer.sharded(copy.deepcopy(trainer.transformer), shape)
    assert any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())
    with Client(trainer.url) as client:
        update = client.update_weights(named(model), bucket_bytes=10**5)
    return {"version": update.weight_version, "num_tensors": update.num_tensors, "sum": replay.weights_checksum(model)}


def push_state_dict(trainer: Trainer) -> dict[str, Any]:
    return _push(trainer, lambda model: model.state_dict())


def push_parameters(trainer: Trainer) -> dict[str, Any]:
    return _push(trainer, lambda model: model.named_parameters())


def push_replicas_of_shards(trainer: Trainer) -> dict[str, Any]:
    return _push(trainer, lambda model: model.state_dict(), (WORLD, 1))


def push_through_a_group(trainer: Trainer) -> dict[str, Any]:
    model = trainer.sharded(copy.deepcopy(trainer.transformer))
    clients = [Client(trainer.url)] if trainer.rank == 0 else []
    with WeightGroup(clients) as group:
        (version,) = group.update_weights(model.state_dict(), bucket_bytes=10**5)
    sums = replay.tensor_checksums(model)
    with Client(trainer.url) as client:
        return {"version": version, "num_tensors": client.verify_weights(sums), "sum": replay.weights_checksum(model)}


def push_adapter(trainer: Trainer) -> dict[str, Any]:
    model = policy(trainer.transformer)
    trainer.sharded(model)
    config = model.peft_config["default"].to_dict()
    with Client(trainer.url) as client:
        change = client.load_lora_adapter_from_tensors(peft.get_peft_model_state_dict(model), config, name="sharded")
    assert change.adapter is not None
    assert change.adapter.sha256 == replay.adapter_checksum(model)
    return {"version": change.weight_version, "name": change.lora_name, "sum": change.adapter.sha256}


def _refused(push: Callable[[], Any]) -> dict[str, Any]:
    try:
        push()
    except FlowrollError as error:
        return {"error": type(error).__name__, "message": error.message, "field": error.field}
    return {"error": None}


def push_too_few(trainer: Trainer) -> dict[str, Any]:
    tensors = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    tensors.pop("x_pad_token")
    with Client(trainer.url) as client:
        return _refused(lambda: client.update_weights(tensors, bucket_bytes=10**5))


def push_one_of_another_shape(trainer: Trainer) -> dict[str, Any]:
    tensors = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    # The second of many buckets.
    tensors[list(tensors)[1]] = torch.zeros(3)
    with Client(trainer.url) as client:
        return _refused(lambda: client.update_weights(tensors, bucket_bytes=1))


def push_one_without_data(trainer: Trainer) -> dict[str, Any]:
    tensors = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    tensors[list(tensors)[1]] = torch.zeros(3, device="meta")
    with Client(trainer.url) as client:
        return _refused(lambda: client.update_weights(tensors, bucket_bytes=1))


def push_to_nobody(trainer: Trainer) -> dict[str, Any]:
    tensors = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        return _refused(lambda: client.update_weights(tensors))


def push_where_the_sender_breaks(trainer: Trainer) -> dict[str, Any]:
    def transport(request: httpx.Request) -> httpx.Response:
        raise LookupError("a bug")

    tensors = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    with Client(trainer.url, transport=httpx.MockTransport(transport)) as client:
        try:
            client.update_weights(tensors)
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


def push_without_servers(trainer: Trainer) -> dict[str, Any]:
    tensors = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    with WeightGroup([]) as group:
        return _refused(lambda: group.update_weights(tensors))


def push_shards_last(trainer: Trainer) -> dict[str, Any]:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "x_pad_token", trainer.transformer.state_dict()["x_pad_token"]
        yield from sharded.items()

    sharded = trainer.sharded(copy.deepcopy(trainer.transformer)).state_dict()
    sharded.pop("x_pad_token")
    with Client(trainer.url) as client:
        return _refused(lambda: client.update_weights(tensors(), bucket_bytes=1))


TAKEN = (push_state_dict, push_parameters, push_replicas_of_shards, push_through_a_group)
REFUSED = {
    push_too_few: ("WeightsRejectedError", "got none for x_pad_token; send the rest"),
    push_one_of_another_shape: ("WeightsRejectedError", r"must hold .* got \[3\]"),
    push_one_without_data: ("InvalidRequestError", "must have its elements in memory, got a meta tensor; load"),
    push_to_nobody: ("ServerConnectionError", "must answer"),
    push_without_servers: ("InvalidRequestError", "give them on the first rank of the mesh"),
}


def _run_rank(rank: int, port: int, url: str, folders: dict[str, Path], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    transformer = ZImageTransformer2DModel.from_pretrained(folders["new"] / "transformer", torch_dtype=torch.float32)
    trainer = Trainer(rank, url, transformer)
    old = load_file(folders["old"] / "transformer" / WEIGHTS)
    found = {}
    with Client(url) as client:
        for push in (*TAKEN, *REFUSED, push_where_the_sender_breaks, push_shards_last, push_adapter):
            if rank == 0:
                client.update_weights(old)
            dist.barrier()
            found[push.__name__] = push(trainer) | {"server": client.weights_checksum()}
            dist.barrier()
        if rank == 0:
            client.update_weights(transformer.state_dict())
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"old": z_image_checkpoint, "new": with_other(z_image_checkpoint, tmp_path_factory.mktemp("new") / "z_image")}


@pytest.fixture(scope="module")
def server(z_image_checkpoint: Path) -> Iterator[httpx.Client]:
    with (
        Engine(z_image_checkpoint, dtype="float32", device="cpu") as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def pushes(folders: dict[str, Path], server: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every push gave, on each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_run_rank, (port, str(server.base_url), folders, out), nprocs=WORLD)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def truth(folders: dict[str, Path]) -> dict[str, tuple[str, Rollout]]:
    """Checksum and rollout of an engine started on the old and on the new weights."""
    found = {}
    for name, folder in folders.items():
        with Engine(folder, dtype="float32", device="cpu") as engine:
            found[name] = engine.weights_checksum(), engine.rollout(**REQUEST)[0]
    return found


@pytest.mark.parametrize("push", TAKEN)
def test_shards_arrive_whole_and_every_rank_has_the_same_answer(
    push: Callable[..., Any], pushes: list[dict[str, Any]], truth: dict[str, tuple[str, Rollout]]
) -> None:
    first, second = (found[push.__name__] for found in pushes)
    assert first == second
    assert first["sum"] == first["server"] == truth["new"][0] != truth["old"][0]
    assert first["num_tensors"] == 73


def test_a_sharded_adapter_arrives_once(pushes: list[dict[str, Any]], server: httpx.Client) -> None:
    first, second = (found["push_adapter"] for found in pushes)
    assert first == second and first["name"] == "sharded"
    with Client(str(server.base_url)) as client:
        assert [(one.name, one.sha256) for one in client.lora_adapters()] == [("sharded", first["sum"])]


@pytest.mark.parametrize("push", REFUSED)
def test_a_refused_push_is_the_same_error_on_every_rank_and_changes_nothing(
    push: Callable[..., Any], pushes: list[dict[str, Any]], truth: dict[str, tuple[str, Rollout]]
) -> None:
    kind, words = REFUSED[push]
    first, second = (found[push.__name__] for found in pushes)
    assert first == second
    assert first["error"] == kind and re.search(words, first["message"])
    assert first["server"] == truth["old"][0]


def test_what_ends_the_sender_does_not_leave_the_others_waiting(
    pushes: list[dict[str, Any]], truth: dict[str, tuple[str, Rollout]]
) -> None:
    first, second = (found["push_where_the_sender_breaks"] for found in pushes)
    assert (first["error"], first["message"]) == ("LookupError", "a bug")
    assert second["error"] == "EngineError"
    assert second["message"] == "the rank that sends must end its push, got LookupError: a bug; look at its log."
    assert first["server"] == second["server"] == truth["old"][0]


def test_a_generator_that_shows_its_shards_too_late_is_refused(
    pushes: list[dict[str, Any]], truth: dict[str, tuple[str, Rollout]]
) -> None:
    found = [one["push_shards_last"] for one in pushes]
    assert {one["server"] for one in found} == {truth["old"][0]}
    # Whoever begins second meets the other's update, or finds it given up.
    assert all(one["error"] in ("InvalidRequestError", "WeightsBusyError") for one in found)
    (late, *_) = (one for one in found if one["error"] == "InvalidRequestError")
    assert late["message"].endswith("give model.state_dict() itself, not a generator.")


def test_the_next_rollout_is_of_the_pushed_weights(
    pushes: list[dict[str, Any]], server: httpx.Client, truth: dict[str, tuple[str, Rollout]]
) -> None:
    with Client(str(server.base_url)) as client:
        (rollout,) = client.rollout(**REQUEST)
    assert_same_bits(rollout, truth["new"][1])
