"""Tensors without ordinary memory, through every door that reads bytes: the right values, or an error that names the tensor."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load
from tests.adapters import policy
from tests.factories import make_rollout
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from flowroll import replay
from flowroll.client import Client
from flowroll.client.weight_group import WeightGroup
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError, ServerConnectionError
from flowroll.wire.files import save_rollout

VALUES = torch.arange(6.0).reshape(2, 3) + 1
NAME = "block.weight"


class Silent(Tensor):
    """A wrapper without memory, whose class takes every operation and does nothing."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


class Renamed(Tensor):
    """A class of a user's, with memory."""


class Answering(Tensor):
    """A class that answers even for attributes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError("not supported")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def freed(nbytes: int = 0) -> Tensor:
    """As FSDP leaves what it has freed: a shape, and a storage that is too small for it."""
    tensor = VALUES.clone()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


READABLE: dict[str, Callable[[DeviceMesh], Tensor]] = {
    "parameter": lambda mesh: nn.Parameter(VALUES),
    "transposed": lambda mesh: VALUES.t().contiguous().t(),
    "every other column": lambda mesh: torch.stack([VALUES, -VALUES], dim=2)[..., 0],
    "negated when read": lambda mesh: torch._neg_view(-VALUES),
    "shard": lambda mesh: distribute_tensor(VALUES, mesh, [Shard(0)]),
    "replica": lambda mesh: distribute_tensor(VALUES, mesh, [Replicate()]),
    "sum over ranks": lambda mesh: DTensor.from_local(VALUES, mesh, [Partial()]),
    "parameter of shards": lambda mesh: nn.Parameter(distribute_tensor(VALUES, mesh, [Shard(1)])),
    "wrapper that copies": lambda mesh: TwoTensor(VALUES, VALUES.clone()),
    "class of a user's": lambda mesh: VALUES.as_subclass(Renamed),
    "class that answers": lambda mesh: VALUES.as_subclass(Answering),
}
REFUSED: dict[str, tuple[Callable[[DeviceMesh], Any], str]] = {
    "meta": (lambda mesh: VALUES.to("meta"), "a meta tensor; load"),
    "meta shard": (lambda mesh: DTensor.from_local(VALUES.to("meta"), mesh, [Shard(0)]), "a meta tensor; load"),
    "fake": (lambda mesh: FakeTensorMode().from_tensor(VALUES), "a FakeTensor "),
    "wrapper that copies nothing": (lambda mesh: Silent(VALUES), "a Silent "),
    "freed": (lambda mesh: freed(), "a Tensor whose memory is freed"),
    "cut short": (lambda mesh: freed(8), "a Tensor whose memory is freed"),
    "sparse": (lambda mesh: VALUES.to_sparse(), r"layout torch\.sparse_coo; call its to_dense\(\)"),
    "compressed": (lambda mesh: VALUES.to_sparse_csr(), r"layout torch\.sparse_csr; call its to_dense\(\)"),
    "quantized": (lambda mesh: torch.quantize_per_tensor(VALUES, 0.1, 0, torch.qint8), r"quantized .* dequantize\(\)"),
    "nested": (lambda mesh: torch.nested.nested_tensor([VALUES, VALUES]), "a nested tensor"),
    "jagged": (lambda mesh: torch.nested.nested_tensor([VALUES, VALUES[:1]], layout=torch.jagged), "a nested tensor"),
    "uninitialized": (lambda mesh: nn.LazyLinear(2).weight, "an uninitialized parameter; run a forward"),
}


def holding(tensor: Any) -> nn.Module:
    """A module whose state_dict has this tensor."""
    module = nn.Module()
    module.block = nn.Module()
    module.block.register_buffer("weight", None)
    module.block._buffers["weight"] = tensor
    return module


class Server:
    """Takes updates and keeps their bodies."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.bodies: list[bytes] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if request.headers.get("content-type") == "application/octet-stream":
            self.bodies.append(request.read())
        if request.url.path == "/weights/begin":
            return httpx.Response(200, json={"update_id": "7"})
        return httpx.Response(200, json={})

    def ask(self, method: str, *args: Any, **values: Any) -> None:
        # The last answer is none that the client knows; what was sent is what counts.
        with (
            Client("http://server.test", transport=httpx.MockTransport(self)) as client,
            contextlib.suppress(ServerConnectionError),
        ):
            getattr(client, method)(*args, **values)


@pytest.mark.parametrize("kind", READABLE)
def test_what_has_elements_is_sent_and_summed_with_its_values(mesh: DeviceMesh, kind: str) -> None:
    tensor = READABLE[kind](mesh)
    server = Server()
    server.ask("update_weights", {NAME: tensor})
    server.ask("load_lora_adapter_from_tensors", {NAME: tensor}, {"r": 1}, name="a")
    assert len(server.bodies) == 2
    for body in server.bodies:
        assert torch.equal(load(body)[NAME], VALUES)
    plain = holding(VALUES)
    assert replay.weights_checksum(holding(tensor)) == replay.weights_checksum(plain)
    assert replay.tensor_checksums(holding(tensor)) == replay.tensor_checksums(plain)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_none_is_refused_by_name_with_what_to_do(mesh: DeviceMesh, kind: str) -> None:
    make, words = REFUSED[kind]
    rule = rf"^{NAME} must (have its elements in memory, got )?.*{words}"
    server = Server()
    with Client("http://server.test", transport=httpx.MockTransport(server)) as client:
        with pytest.raises(InvalidRequestError, match=rule):
            client.update_weights({NAME: make(mesh)})
        with pytest.raises(InvalidRequestError, match=rule):
            client.update_weights(iter([(NAME, make(mesh))]), bucket_bytes=1)
        with pytest.raises(InvalidRequestError, match=rule):
            client.load_lora_adapter_from_tensors({NAME: make(mesh)}, {"r": 1}, name="a")
    # An update that was begun before the tensor was read is given up.
    assert server.bodies == [] and "/weights/7/commit" not in server.paths
    assert server.paths.count("/weights/begin") == server.paths.count("/weights/7/abort")
    for sums in (replay.weights_checksum, replay.tensor_checksums):
        with pytest.raises(InvalidRequestError, match=rule):
            sums(holding(make(mesh)))


def test_a_rollout_with_such_a_tensor_is_not_saved(tmp_path: Path) -> None:
    rollout = make_rollout()
    object.__setattr__(rollout, "log_probs", rollout.log_probs.to("meta"))
    with pytest.raises(InvalidRequestError, match=r"log_probs must have its elements in memory, got a meta tensor"):
        save_rollout(tmp_path / "rollout", rollout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (VALUES, r"named_tensors must be pairs of a name and a tensor, got a Tensor; give model\.state_dict\(\)"),
        ("ab", "pairs of a name and a tensor, got a str"),
        (("a", VALUES, 1), "pairs of a name and a tensor, got a tuple"),
        ((NAME, VALUES.numpy()), rf"{NAME} must be a torch tensor, got ndarray; convert it with torch\.as_tensor"),
        ((NAME, None), f"{NAME} must be a torch tensor, got NoneType"),
    ],
)
def test_what_are_no_named_tensors_is_refused(given: Any, words: str) -> None:
    server = Server()
    with (
        Client("http://server.test", transport=httpx.MockTransport(server)) as client,
        pytest.raises(InvalidRequestError, match=words),
    ):
        # The type checker of these tests does not look into an iterator.
        client.update_weights(iter([given]))
    assert server.paths == []


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu", dtype="float32") as engine:
        yield engine


def test_an_engine_takes_shards_of_a_trainer_in_its_own_process(mesh: DeviceMesh, engine: Engine) -> None:
    transformer = copy.deepcopy(engine._model.transformer)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(1.01)
    plain = replay.weights_checksum(transformer)
    sharded = fully_shard(transformer, mesh=mesh)
    assert engine.weights_checksum() != plain == replay.weights_checksum(sharded)
    engine.update_weights_from_tensors(sharded.state_dict())
    assert engine.weights_checksum() == plain
    model = policy(engine._model.transformer)
    tensors, config = peft.get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    shards = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
    change = engine.load_lora_adapter_from_tensors(shards, config, name="sharded")
    assert change.adapter is not None and change.adapter.sha256 == replay.adapter_checksum(model)


@pytest.mark.parametrize("kind", REFUSED)
def test_an_engine_refuses_by_name_what_has_no_elements(mesh: DeviceMesh, engine: Engine, kind: str) -> None:
    make, words = REFUSED[kind]
    before = engine.weights_checksum()
    with pytest.raises(InvalidRequestError, match=rf"^{NAME} must have .*{words}"):
        engine.update_weights_from_tensors({NAME: make(mesh)})
    with pytest.raises(InvalidRequestError, match=rf"^{NAME} must have .*{words}"):
        engine.load_lora_adapter_from_tensors({NAME: make(mesh)}, {"r": 1}, name="none")
    assert engine.weights_checksum() == before


@pytest.mark.parametrize("kind", REFUSED)
def test_a_group_refuses_by_name_what_has_no_elements(mesh: DeviceMesh, kind: str) -> None:
    make, words = REFUSED[kind]
    with WeightGroup([]) as group, pytest.raises(InvalidRequestError, match=rf"^{NAME} must have .*{words}"):
        group.update_weights({NAME: make(mesh)})


def test_a_group_without_servers_says_who_gives_them() -> None:
    with WeightGroup([]) as group, pytest.raises(InvalidRequestError, match="give them on the first rank of the mesh"):
        group.update_weights({NAME: VALUES})
