"""A trainer's push to a server of several ranks: every bucket in place on all of them, and no sample between two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file
from tests.adapters import policy, saved
from tests.distributed.test_rank_group import no_torchrun  # noqa: F401  # an autouse fixture
from tests.distributed.test_weight_updates import EVERY_LAYOUT, LAYOUTS, REQUEST
from tests.pickling import pushed, trainer
from tests.rollouts import assert_same_bits, tensors_of
from tests.serving.servers import Background, error_of, serving, until
from tests.serving.test_pushed_lora import factors, parts, push
from tests.serving.test_shared_tensor_route import CHECKER, ROUTE, is_holding, send, sums
from tests.weights import WEIGHTS, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService

Truth = list[tuple[dict[str, Tensor], Rollout, str]]


@pytest.fixture(autouse=True)
def as_a_trainer() -> Iterator[None]:
    with trainer():
        yield


@pytest.fixture(scope="module")
def truth(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Weights, rollout and checksum of one rank: the old ones, the new ones, and the old ones with an adapter."""
    found = []
    folder = tmp_path_factory.mktemp("truth")
    for place in (z_image_checkpoint, with_other(z_image_checkpoint, folder / "other")):
        with Engine(place, device="cpu") as engine:
            (rollout,) = engine.rollout(**REQUEST)
            found.append((load_file(place / "transformer" / WEIGHTS), rollout, engine.weights_checksum()))
            if len(found) == 1:
                model = policy(engine._model.transformer)
                engine.load_lora_adapter(saved(model, folder / "a"), name="a")
                adapted = factors(model), engine.rollout(**REQUEST, lora_name="a")[0], ""
    return [*found, adapted]


@pytest.fixture(scope="module", params=EVERY_LAYOUT)
def server(request: pytest.FixtureRequest, z_image_checkpoint: Path) -> Iterator[httpx.Client]:
    with (
        Engine(z_image_checkpoint, device="cpu", layout=LAYOUTS[request.param], rank_timeout_s=30.0) as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service, allow_pickle_weights=True) as server,
    ):
        yield server


def test_buckets_are_in_place_on_every_rank_and_no_sample_starts_between_them(server: httpx.Client, truth: Truth) -> None:
    (_, old, _), (tensors, new, new_sum), _ = truth
    size = sum(tensor.nbytes for tensor in tensors.values()) // 2
    with Client(str(server.base_url)) as client:
        assert_same_bits(client.rollout(**REQUEST)[0], old)
        answers: list[Any] = []
        waiting: list[Background] = []
        for place, (body, _) in enumerate(pushed(tensors, version="5", bucket_bytes=size)):
            answer = server.post(ROUTE, json=body)
            assert answer.status_code == 200, answer.text
            if place == 0:
                assert not answer.json()["is_complete"] and is_holding(server)
                arrived = answer.json()["num_arrived"]
                part = dict(list(tensors.items())[:arrived])
                # Whole tensors, of whose rows every rank has its own.
                checked = {"target_module": "transformer", "expected_named_tensors_sha256": sums(part)}
                assert server.post(CHECKER, json=checked).json()["success"] is True
                waiting.append(Background(lambda: answers.append(client.rollout(**REQUEST)[0]) or server.get("/health")))  # type: ignore[func-returns-value]
                until(lambda: server.get("/server_info").json()["queue"]["pending"] == 1)
        assert answer.json()["is_complete"] and not is_holding(server)
        waiting[0].answer()
        assert_same_bits(answers[0], new)
        assert answers[0].weight_version == "5" and client.weights_checksum() == new_sum
    name = next(iter(tensors))
    answer = send(server, [(name, tensors[name]), ("no.such", tensors[name])])
    assert answer.status_code == 422 and "no.such" in error_of(answer)["message"]


@pytest.mark.parametrize("mode", ["drain", "abort"])
def test_a_push_comes_while_samples_run_on_every_rank(mode: str, server: httpx.Client, truth: Truth) -> None:
    (old_tensors, _, _), (tensors, _, new_sum), _ = truth
    several = {**REQUEST, "num_inference_steps": 6, "num_outputs_per_prompt": 2}

    def queue() -> dict[str, int]:
        return server.get("/server_info").json()["queue"]

    with Client(str(server.base_url)) as client:
        expected = {}
        for version, weights in (("new", tensors), ("old", old_tensors)):
            client.update_weights(weights, weight_version=version)
            expected[version] = client.rollout(**several)
        answers: dict[str, list[Rollout]] = {}

        def ask(name: str) -> Background:
            return Background(lambda: answers.update({name: client.rollout(**several)}) or server.get("/health"))

        names = list(tensors)
        asked = [ask("running")]
        until(lambda: queue()["running"] == 1)
        for part in (names[::2], names[1::2]):
            answer = send(server, [(name, tensors[name]) for name in part], weight_version="new", mode=mode)
            assert answer.status_code == 200, answer.text
            asked.append(ask(part[0]))
            if part[0] == names[0]:
                until(lambda: queue()["pending"] >= 1)
                assert is_holding(server) and queue()["running"] == 0
        assert not is_holding(server) and client.weights_checksum() == new_sum
        for one in asked:
            one.answer()
    assert len(answers) == 3
    for name, rollouts in answers.items():
        version = "old" if name == "running" and mode == "drain" else "new"
        assert len(rollouts) == 2
        for rollout, other in zip(rollouts, expected[version], strict=True):
            assert_same_bits(rollout, other)
            assert rollout.weight_version == version


def test_a_pushed_adapter_runs_on_every_rank(server: httpx.Client, truth: Truth) -> None:
    (tensors, old, _), _, (adapter, expected, _) = truth
    with Client(str(server.base_url)) as client:
        assert send(server, list(tensors.items())).json()["is_complete"]
        for bucket in parts(adapter):
            push(server, bucket)
        (got,) = client.rollout(**REQUEST)
        left, right = dict(tensors_of(got)), dict(tensors_of(expected))
        assert left.keys() == right.keys() and all(tensor.equal(right[name]) for name, tensor in left.items())
        assert got.sampling.lora is not None and expected.sampling.lora is not None
        assert got.sampling.lora.sha256 == expected.sampling.lora.sha256
        client.unload_lora_adapter("lora_merge")
        assert_same_bits(client.rollout(**REQUEST)[0], old)
