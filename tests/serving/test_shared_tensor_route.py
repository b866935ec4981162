"""POST /update_weights_from_tensor, as a trainer of SGLang calls it."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from tests.pickling import flattened, text, trainer
from tests.rollouts import assert_same_bits
from tests.serving.servers import error_of, serving, until
from tests.serving.test_tensor_routes import halves
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.worker import EngineWorker

ROUTE = "/update_weights_from_tensor"


@pytest.fixture(autouse=True)
def as_a_trainer() -> Iterator[None]:
    with trainer():
        yield


@pytest.fixture(scope="module")
def truth(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], Rollout, str]]:
    """Weights, rollout and checksum, for the old and for the new weights."""
    found = []
    for folder in (z_image_checkpoint, with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")):
        with Engine(folder, device="cpu") as engine:
            (rollout,) = engine.rollout(**REQUEST)
            found.append((load_file(folder / "transformer" / WEIGHTS), rollout, engine.weights_checksum()))
    return found


@pytest.fixture(scope="module")
def worker(z_image_checkpoint: Path) -> Iterator[EngineWorker]:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineWorker(engine, max_queue=4) as worker:
        yield worker


@pytest.fixture(scope="module")
def server(worker: EngineWorker) -> Iterator[httpx.Client]:
    with serving(worker, allow_pickle_weights=True, weights_idle_s=5.0) as client:
        yield client


def send(server: httpx.Client, value: object, **body: Any) -> httpx.Response:
    return server.post(ROUTE, json={"serialized_named_tensors": [text(value)], **body})


@pytest.mark.parametrize("load_format", ["flattened_bucket", None])
def test_buckets_of_a_trainer_give_the_rollouts_of_an_engine_started_on_them(
    load_format: str | None, server: httpx.Client, worker: EngineWorker, truth: list[tuple[dict[str, Tensor], Rollout, str]]
) -> None:
    (before, old, old_sum), (tensors, new, new_sum) = truth
    engine = worker.engine
    engine.update_weights_from_tensors(before)
    options = {"load_format": load_format, "target_modules": ["transformer"], "weight_version": f"v-{load_format}"}
    segments = set(os.listdir("/dev/shm"))
    first, second = (flattened(half) if load_format else list(half.items()) for half in halves(tensors))
    answer = send(server, first, flush_cache=False, **options)
    assert answer.json()["success"] is True and answer.json()["is_complete"] is False
    assert answer.json()["message"] == "37 of 73 tensors have arrived"
    # Nothing has changed yet: never half of it.
    assert engine.weights_checksum() == old_sum
    assert_same_bits(engine.rollout(**REQUEST)[0], old)
    answer = send(server, second, flush_cache=True, **options)
    assert answer.json()["is_complete"] is True and answer.json()["weight_version"] == f"v-{load_format}"
    assert engine.weights_checksum() == new_sum
    (got,) = engine.rollout(**REQUEST)
    assert_same_bits(got, new)
    assert got.weight_version == f"v-{load_format}"
    if load_format:
        # The trainer's memory is free again once it lets go; of the pairs, the fixture holds the tensors.
        del first, second
        assert set(os.listdir("/dev/shm")) - segments == set()


def test_a_trainer_that_begins_again_is_never_mixed_with_what_it_sent_before(
    server: httpx.Client, worker: EngineWorker, truth: list[tuple[dict[str, Tensor], Rollout, str]]
) -> None:
    (before, _, _), (tensors, _, new_sum) = truth
    worker.engine.update_weights_from_tensors(before)
    first, second = halves(tensors)
    spoilt = {name: tensor * 3 for name, tensor in first.items()}
    for version in ({"weight_version": "a"}, {}):
        # Killed after its first bucket; the next one begins with the same bucket, or under another version.
        assert send(server, list(spoilt.items()), **version).json()["num_arrived"] == 37
        assert send(server, list(first.items())).json()["num_arrived"] == 37
        assert send(server, list(second.items())).json()["is_complete"] is True
        assert worker.engine.weights_checksum() == new_sum


def test_an_error_ends_the_update_and_leaves_everything(
    server: httpx.Client, worker: EngineWorker, truth: list[tuple[dict[str, Tensor], Rollout, str]]
) -> None:
    (before, old, old_sum), (tensors, _, _) = truth
    worker.engine.update_weights_from_tensors(before, weight_version="kept")
    first, second = halves(tensors)
    name = list(second)[-1]
    assert send(server, list(first.items())).status_code == 200
    answer = send(server, list({**second, name: torch.zeros(7)}.items()))
    assert answer.status_code == 422 and name in error_of(answer)["message"]
    # The first half is gone with it.
    assert send(server, list(second.items())).json()["num_arrived"] == 36
    assert server.post("/weights/begin").status_code == 409
    # Then the trainer falls silent.
    until(lambda: server.post("/weights/begin").status_code == 200)
    until(lambda: send(server, list(second.items())[:1]).status_code == 200)
    with Client(str(server.base_url)) as client:
        assert client.weights_checksum() == old_sum and client.server_info()["weight_version"] == "kept"
        assert_same_bits(client.rollout(**REQUEST)[0], old)


def test_a_bucket_that_is_refused_before_it_is_copied_frees_the_trainers_memory(
    server: httpx.Client, truth: list[tuple[dict[str, Tensor], Rollout, str]]
) -> None:
    name, tensor = next(iter(truth[0][0].items()))
    segments = set(os.listdir("/dev/shm"))
    # Any update that an earlier test left behind goes first.
    until(lambda: server.post("/weights/begin").status_code == 200)
    own = tensor.clone()
    assert send(server, [(name, own)]).status_code == 409
    assert len(set(os.listdir("/dev/shm")) - segments) == 1
    del own
    assert set(os.listdir("/dev/shm")) <= segments


class _Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


def test_anything_else_is_refused_by_name(server: httpx.Client, worker: EngineWorker, tmp_path: Path) -> None:
    before = worker.engine.weight_version, worker.engine.weights_checksum()
    answer = send(server, pickle.dumps(_Evil(tmp_path / "run")))
    assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
    assert "posix.system" in error_of(answer)["message"]
    assert not (tmp_path / "run").exists()
    for body, status, field in (
        ({}, 422, "serialized_named_tensors"),
        ({"serialized_named_tensors": []}, 422, "serialized_named_tensors"),
        ({"serialized_named_tensors": ["?"]}, 400, "serialized_named_tensors"),
        ({"serialized_named_tensors": ["AAAA"]}, 400, "serialized_named_tensors"),
        ({"serialized_named_tensors": [text([])], "load_format": "auto"}, 422, "load_format"),
        ({"serialized_named_tensors": [text([])], "target_modules": ["text_encoder"]}, 422, "target_modules"),
        ({"serialized_named_tensors": [text([])], "weight_version": ""}, 422, "weight_version"),
        ({"serialized_named_tensors": [text([])], "load_format": "flattened_bucket"}, 400, "serialized_named_tensors"),
    ):
        answer = server.post(ROUTE, json=body)
        assert (answer.status_code, error_of(answer)["field"]) == (status, field), answer.text
    assert (worker.engine.weight_version, worker.engine.weights_checksum()) == before


def test_without_leave_nothing_is_read(worker: EngineWorker) -> None:
    with serving(worker) as server:
        answer = send(server, [])
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
        assert "--allow-pickle-weights" in error_of(answer)["message"]
