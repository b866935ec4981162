"""Trainers that send something else than they announce, and ports that say nothing, harm neither the weights nor others."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.serving.servers import WAIT_S, Background, error_of, serving, until
from torch import Tensor
from torch.distributed import TCPStore

from flowroll.client import Client
from flowroll.client.weight_group import WeightGroup
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import WeightsRejectedError
from flowroll.families.checksums import tensors_digest
from flowroll.parallel.broadcasting import BroadcastGroup

INIT, UPDATE, DESTROY = "/init_weights_update_group", "/update_weights_from_distributed", "/destroy_weights_update_group"
NAME = "layers.0.attention.to_q.weight"
JOIN_S = 3.0


@pytest.fixture(scope="module")
def service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, rank_timeout_s=JOIN_S, weights_idle_s=0.5) as client:
        yield client


class Trainer:
    """Rank 0 of a group, which may broadcast whatever it likes."""

    def __init__(self, server: httpx.Client, name: str) -> None:
        self._server, self._name = server, name
        store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
        place = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}
        joining = Background(lambda: server.post(INIT, json={**place, "backend": "gloo", "group_name": name}))
        self._group = BroadcastGroup(
            name,
            rank=0,
            world_size=2,
            backend="gloo",
            address="127.0.0.1",
            port=store.port,
            timeout_s=WAIT_S,
            store=store,
        )
        assert joining.answer().status_code == 200

    def push(self, announced: Tensor, sent: Tensor, **fields: Any) -> httpx.Response:
        """Announces one tensor, and broadcasts another."""
        dtype = str(announced.dtype).removeprefix("torch.")
        body = {"names": [NAME], "dtypes": [dtype], "shapes": [list(announced.shape)], "group_name": self._name, **fields}
        answer = Background(lambda: self._server.post(UPDATE, json=body))
        with contextlib.suppress(WeightsRejectedError):
            self._group.broadcast(sent)
        return answer.answer()

    def close(self) -> None:
        self._group.close()


@pytest.fixture
def weight(service: EngineService) -> Tensor:
    return service.engine._model.transformer.state_dict()[NAME].clone()


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (lambda weight: weight.double(), "more bytes than were announced"),
        (lambda weight: weight.bfloat16(), "got fewer bytes"),
        (lambda weight: weight[:0], "got fewer bytes"),
        (lambda weight: weight.flatten()[:-1], "got fewer bytes"),
        (lambda weight: weight * torch.nan, "NaN or infinity in"),
    ],
    ids=["float64", "bfloat16", "nothing", "one too few", "NaN"],
)
def test_other_bytes_than_were_announced_cost_the_group_alone(
    sent: Any, words: str, flattened: bool, server: httpx.Client, service: EngineService, weight: Tensor
) -> None:
    before = service.engine.weights_checksum()
    trainer = Trainer(server, "odd")
    broadcast = sent(weight)
    options = {"load_format": "flattened_bucket"} if flattened else {}
    answer = trainer.push(weight, broadcast.reshape(-1).view(torch.uint8) if flattened else broadcast, **options)
    assert answer.status_code == 422 and words in error_of(answer)["message"], answer.text
    assert server.post(DESTROY, json={"group_name": "odd"}).status_code == 200
    trainer.close()
    assert service.engine.weights_checksum() == before
    until(lambda: "flowroll_is_holding 0" in server.get("/metrics").text)


def test_a_digest_finds_another_dtype_of_the_same_size_and_without_one_the_answer_says_so(
    server: httpx.Client, service: EngineService, weight: Tensor
) -> None:
    before = service.engine.weights_checksum()
    other = torch.full(weight.shape, 1_000_000_000, dtype=torch.int32)
    assert other.view(torch.float32).isfinite().all()
    trainer = Trainer(server, "digest")
    good = trainer.push(weight, weight, sha256=tensors_digest([weight]))
    assert good.json()["verified"] is True and service.engine.weights_checksum() == before
    assert trainer.push(weight, weight).json()["verified"] is False
    wrong = trainer.push(weight, other, sha256=tensors_digest([weight]))
    assert wrong.status_code == 422 and "must have the sha256 that was sent with it" in error_of(wrong)["message"]
    trainer.close()
    assert service.engine.weights_checksum() == before


def test_our_trainers_end_sends_a_digest_unless_it_is_told_not_to(
    server: httpx.Client, service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | None] = []
    fill = EngineService.fill_from_group

    def noted(self: EngineService, *arguments: Any, **options: Any) -> Any:
        given.append(options["sha256"])
        return fill(self, *arguments, **options)

    noted.is_blocking = True  # type: ignore[attr-defined]
    noted.__name__ = fill.__name__
    monkeypatch.setattr(EngineService, "fill_from_group", noted)
    tensors = {name: tensor.clone() for name, tensor in service.engine._model.transformer.state_dict().items()}
    with Client(str(server.base_url)) as client, WeightGroup([client], timeout_s=WAIT_S) as group:
        group.update_weights(tensors)
        group.update_weights(tensors, verify=False)
    assert given == [tensors_digest(tensors.values()), None]


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


def silent_join(server: httpx.Client, port: int, name: str) -> Background:
    place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    return Background(lambda: server.post(INIT, json={**place, "group_name": name}, timeout=WAIT_S))


def test_a_join_to_a_silent_port_holds_up_no_other_and_ends_in_time(server: httpx.Client) -> None:
    with silent_port() as port:
        silent = [silent_join(server, port, name) for name in ("silent", "silent too")]
        trainer = Trainer(server, "prompt")
        again = Trainer(server, "silent")
        trainer.close()
        again.close()
        messages = [error_of(one.answer())["message"] for one in silent]
    assert "got another of its name" in messages[0] or "(another of its name)" in messages[0], messages
    assert "(silence for" in messages[1] and f"start all of them within {JOIN_S:g} s" in messages[1], messages
    for name in ("prompt", "silent"):
        assert server.post(DESTROY, json={"group_name": name}).status_code == 200


def test_joins_are_bounded_with_those_that_wait(service: EngineService) -> None:
    other = EngineService(service.engine, max_queue=4, max_groups=2)
    with serving(other, rank_timeout_s=JOIN_S) as server, silent_port() as port:
        waiting = [silent_join(server, port, name) for name in ("a", "b")]
        until(lambda: len(other._groups._groups) == 2)
        refused = silent_join(server, port, "c").answer()
        assert (refused.status_code, error_of(refused)["code"]) == (409, "weights_busy")
        # And they can be given up.
        assert server.post(DESTROY, json={"group_name": "a"}).status_code == 200
        assert [one.answer().status_code for one in waiting] == [422, 422]
