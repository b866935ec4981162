"""POST /update_weights_from_tensor, as the trainers of SGLang and miles call it."""

import itertools
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from tests.pickling import flattened, own_segments, pushed, text, trainer
from tests.rollouts import assert_same_bits
from tests.serving.servers import Background, Gate, HookedEngine, error_of, serving, until
from tests.serving.test_tensor_routes import halves
from tests.weights import REQUEST, WEIGHTS, change, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import WeightsBusyError
from flowroll.replay import weights_checksum

ROUTE, CHECKER = "/update_weights_from_tensor", "/update_weights_from_tensor_checker"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = [*DTYPES, "mixed"]
Truth = list[tuple[dict[str, Tensor], Rollout, str]]
PLAIN: dict[str, Any] = {"prompt": "a cat", "seed": 3, "height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def as_a_trainer() -> Iterator[None]:
    with trainer():
        yield


@pytest.fixture(scope="module")
def truth(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Weights, rollout and checksum, for the old and for the new weights."""
    found = []
    for folder in (z_image_checkpoint, with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")):
        with Engine(folder, device="cpu") as engine:
            (rollout,) = engine.rollout(**REQUEST)
            found.append((load_file(folder / "transformer" / WEIGHTS), rollout, engine.weights_checksum()))
    return found


@pytest.fixture(scope="module")
def service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with HookedEngine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, allow_pickle_weights=True, weights_idle_s=60.0) as client:
        yield client


@pytest.fixture
def old(service: EngineService, server: httpx.Client, truth: Truth) -> Rollout:
    """The engine has the old weights, as version "kept", and no push is incomplete."""
    assert send(server, list(truth[0][0].items()), weight_version="kept").json()["is_complete"]
    return truth[0][1]


def send(server: httpx.Client, value: object, **body: Any) -> httpx.Response:
    return server.post(ROUTE, json={"serialized_named_tensors": [text(value)], **body})


def metrics_of(server: httpx.Client) -> dict[str, float]:
    found = re.findall(r"^(flowroll_\S+) (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def is_holding(server: httpx.Client) -> bool:
    return metrics_of(server)["flowroll_is_holding"] == 1


def outcomes(server: httpx.Client) -> dict[str, float]:
    found = metrics_of(server)
    names = ("completed", "idle", "restarted", "replaced")
    return {name: found.get(f'flowroll_weight_pushes_total{{outcome="{name}"}}', 0.0) for name in names}


def ended(server: httpx.Client, before: Mapping[str, float]) -> dict[str, float]:
    """How pushes have ended since."""
    return {name: count - before[name] for name, count in outcomes(server).items() if count != before[name]}


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_push_of_a_trainer_gives_the_rollouts_of_an_engine_started_on_the_weights(
    dtype: Any, server: httpx.Client, service: EngineService, old: Rollout, z_image_checkpoint: Path, tmp_path: Path
) -> None:
    fresh = with_other(z_image_checkpoint, tmp_path / "fresh", factor=0.9 + KINDS.index(dtype) / 50)
    kinds = itertools.cycle(DTYPES if dtype == "mixed" else [dtype])
    change(fresh / "transformer", lambda tensors: {name: tensor.to(next(kinds)) for name, tensor in tensors.items()})
    tensors, before, segments = load_file(fresh / "transformer" / WEIGHTS), outcomes(server), own_segments()
    size = sum(tensor.nbytes for tensor in tensors.values()) // 3
    count = 0
    for body, kept in pushed(tensors, version=f"{dtype}", bucket_bytes=size, num_ranks=2):
        answer = server.post(ROUTE, json=body)
        assert answer.status_code == 200 and answer.json()["success"] is True, answer.text
        assert answer.json()["weight_version"] == f"{dtype}"
        # It is in place now: what was sent is what is there.
        names = [metadata.name for metadata in kept[0]["transformer"]["metadata"]]  # type: ignore[index]
        live = dict(service.engine._model.transformer.state_dict())
        for name in names:
            assert torch.equal(live[name], tensors[name].to(live[name].dtype)), name
        count += len(names)
        assert answer.json()["is_complete"] == (count == len(tensors)) != is_holding(server)
    assert ended(server, before) == {"completed": 1}
    # The memory of both ranks' buckets is free once the trainer lets go, although the first rank's was read alone.
    del kept
    until(lambda: own_segments() <= segments)
    with Engine(fresh, device="cpu") as engine, Client(str(server.base_url)) as client:
        (got,), (expected,) = client.rollout(**REQUEST), engine.rollout(**REQUEST)
        assert_same_bits(got, expected)
        assert got.weight_version == f"{dtype}" and client.weights_checksum() == engine.weights_checksum()
        assert weights_checksum(engine._model.transformer) == client.weights_checksum()


@pytest.mark.parametrize("form", ["bucket", "keyed bucket", "list", "keyed list"])
def test_every_form_of_a_payload_is_taken(
    form: str, server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    tensors, new, new_sum = truth[1]
    value: Any = flattened(tensors) if "bucket" in form else list(tensors.items())
    value = {"transformer": value} if "keyed" in form else value
    load_format = "flattened_bucket" if "bucket" in form else None
    answer = send(server, value, load_format=load_format, payload_gpu_uuids=None, flush_cache=True, weight_version="7")
    assert answer.json() == {
        "success": True,
        "message": "73 tensors of transformer are in place",
        "module": "transformer",
        "is_complete": True,
        "weight_version": "7",
        "num_arrived": 73,
        "num_tensors": 73,
        "verified": False,
    }
    assert service.engine.weights_checksum() == new_sum
    assert_same_bits(service.engine.rollout(**REQUEST)[0], new)


def test_the_vae_is_pushed_under_its_name(server: httpx.Client, service: EngineService, old: Rollout) -> None:
    tensors = {name: tensor.clone() for name, tensor in service.engine._pipeline.vae.state_dict().items()}
    before = service.engine.weights_checksum("vae")
    halved = {name: tensor * 0.5 for name, tensor in tensors.items()}
    answer = send(server, {"vae": flattened(halved)}, load_format="flattened_bucket", target_modules=["vae"])
    assert answer.json()["is_complete"] and service.engine.weights_checksum("vae") != before
    answer = send(server, {"vae": flattened(tensors)}, load_format="flattened_bucket")
    assert (answer.status_code, error_of(answer)["field"]) == (422, "serialized_named_tensors")
    assert "target_modules" in error_of(answer)["message"]
    assert send(server, {"vae": list(tensors.items())}, target_modules=["vae"]).json()["is_complete"]
    assert service.engine.weights_checksum("vae") == before


def test_no_sample_starts_between_the_buckets_of_a_push(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    new, engine, gate = truth[1][1], service.engine, Gate()
    assert isinstance(engine, HookedEngine)
    first, second = halves(truth[1][0])
    with Client(str(server.base_url)) as client:
        engine.hook = gate
        answers: list[Rollout] = []
        ask = lambda: answers.extend(client.rollout(**REQUEST)) or server.get("/health")  # noqa: E731
        running = Background(ask)  # type: ignore[arg-type]
        assert gate.entered.wait(60)
        # The bucket waits for what runs, which has one set of weights from its first step to its last.
        bucket = Background(lambda: send(server, list(first.items()), weight_version="8"))
        until(lambda: is_holding(server))
        waiting = Background(ask)  # type: ignore[arg-type]
        until(lambda: server.get("/server_info").json()["queue"]["pending"] == 1)
        engine.hook = lambda plan: None
        gate.opened.set()
        assert bucket.answer().json()["is_complete"] is False
        running.answer()
        (finished,) = answers
        assert_same_bits(finished, old)
        assert finished.weight_version == "kept"
        # The next one would begin on a mixture.
        message = bucket.answer().json()["message"]
        assert message == (
            "37 tensors of transformer are in place; 36 of 73 are missing, and no sample starts until they have come"
        )
        later = Background(ask)  # type: ignore[arg-type]
        until(lambda: server.get("/server_info").json()["queue"]["pending"] == 2)
        assert is_holding(server) and server.get("/server_info").json()["queue"]["running"] == 0
        assert server.get("/health_generate").status_code == 200
        assert len(answers) == 1
        assert send(server, list(second.items()), weight_version="8").json()["is_complete"] is True
        assert not is_holding(server)
        waiting.answer()
        later.answer()
    for rollout in answers[1:]:
        assert_same_bits(rollout, new)
        assert rollout.weight_version == "8"


def test_what_was_running_may_be_done_again_with_the_new_weights(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    engine, gate = service.engine, Gate()
    assert isinstance(engine, HookedEngine)
    first, second = halves(truth[1][0])
    engine.hook = gate
    with Client(str(server.base_url)) as client:
        answers: list[Rollout] = []
        running = Background(lambda: answers.extend(client.rollout(**REQUEST)) or server.get("/health"))  # type: ignore[arg-type]
        assert gate.entered.wait(60)
        bucket = Background(lambda: send(server, list(first.items()), mode="abort"))
        until(lambda: server.get("/server_info").json()["queue"]["pending"] == 1)
        engine.hook = lambda plan: None
        gate.opened.set()
        assert bucket.answer().json()["is_complete"] is False and not answers
        assert send(server, list(second.items()), mode="abort").json()["is_complete"] is True
        running.answer()
    assert_same_bits(answers[0], truth[1][1])


def test_a_push_that_is_not_completed_is_given_up_after_a_silence(
    service: EngineService, truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = halves(truth[1][0])
    with serving(service, allow_pickle_weights=True, weights_idle_s=0.5) as server, Client(str(server.base_url)) as client:
        service.engine.update_weights_from_tensors(truth[0][0])
        with caplog.at_level(logging.WARNING, "flowroll.serving.pushes"):
            assert send(server, list(first.items()), weight_version="half").json()["is_complete"] is False
            (got,) = client.rollout(**REQUEST)
        assert got.weight_version == "half" and not is_holding(server)
        assert outcomes(server) == {"completed": 0, "idle": 1, "restarted": 0, "replaced": 0}
        (record,) = [record for record in caplog.records if "silent" in record.message]
        assert "with 37 of 73 tensors; samples start again, on new and old weights" in record.message
        # The rest belongs to another push then.
        assert send(server, list(second.items()), weight_version="half").json()["is_complete"] is False
        assert send(server, list(first.items()), weight_version="half").json()["is_complete"] is True
        assert_same_bits(client.rollout(**REQUEST)[0], truth[1][1])


@pytest.mark.parametrize("version", ["another", None])
def test_everything_has_to_come_once_more_when_a_trainer_begins_again(
    version: str | None, server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    before = outcomes(server)
    first, second = halves(truth[1][0])
    spoilt = {name: tensor * 3 for name, tensor in second.items()}
    # Killed after its second half; the next one has another version, or begins with a tensor that came.
    assert send(server, list(spoilt.items()), weight_version="killed").json()["num_arrived"] == 36
    if version is None:
        assert send(server, list(spoilt.items()), weight_version="killed").json()["num_arrived"] == 36
        version = "killed"
    assert send(server, list(first.items()), weight_version="last").json()["num_arrived"] == 37
    assert is_holding(server)
    assert send(server, list(second.items()), weight_version="last").json()["is_complete"] is True
    assert service.engine.weights_checksum() == truth[1][2] and not is_holding(server)
    assert ended(server, before) == {"completed": 1, "restarted": 1 if version == "another" else 2}


def test_a_push_without_a_version_is_counted_once(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    service.engine.update_weights_from_tensors(truth[0][0], weight_version="100")
    first, second = halves(truth[1][0])
    versions = [send(server, list(half.items())).json()["weight_version"] for half in (first, second, first, second)]
    assert versions == ["101", "101", "102", "102"]


def test_an_error_leaves_everything_and_the_push_goes_on(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    before = outcomes(server)
    first, second = halves(truth[1][0])
    name = list(second)[-1]
    for wrong in (
        {**first, name: torch.zeros(7)},
        {**first, "no.such": torch.zeros(7)},
        {"x_pad_token": first["x_pad_token"].int()},
    ):
        answer = send(server, list(wrong.items()))
        assert answer.status_code == 422 and list(wrong)[-1] in error_of(answer)["message"]
        # Nothing was begun.
        assert not is_holding(server) and service.engine.weight_version == "kept"
    assert service.engine.weights_checksum() == truth[0][2]
    assert send(server, list(first.items())).status_code == 200
    between = service.engine.weights_checksum()
    assert send(server, list({**second, name: torch.zeros(7)}.items())).status_code == 422
    assert send(server, []).status_code == 422
    assert service.engine.weights_checksum() == between and is_holding(server)
    assert send(server, list(second.items())).json()["is_complete"] is True
    assert service.engine.weights_checksum() == truth[1][2]
    assert ended(server, before) == {"completed": 1}


def test_a_bucket_that_cannot_be_put_in_place_has_not_come(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = halves(truth[1][0])
    assert send(server, list(first.items())).status_code == 200
    server.post("/release_memory_occupation").raise_for_status()
    try:
        assert send(server, list(second.items())).status_code == 409
    finally:
        server.post("/resume_memory_occupation").raise_for_status()
    assert is_holding(server)
    assert send(server, list(second.items())).json()["is_complete"] is True
    assert service.engine.weights_checksum() == truth[1][2]


def test_a_whole_module_from_elsewhere_ends_a_push(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    before = outcomes(server)
    first, _ = halves(truth[1][0])
    assert send(server, list(first.items())).json()["is_complete"] is False
    with Client(str(server.base_url)) as client:
        part = dict(list(first.items())[:2])
        client.update_weights(part, partial=True)
        assert is_holding(server)
        client.update_weights(truth[1][0])
        assert not is_holding(server) and ended(server, before) == {"replaced": 1}
        assert_same_bits(client.rollout(**REQUEST)[0], truth[1][1])


def test_nothing_is_scored_with_a_mixture(server: httpx.Client, service: EngineService, old: Rollout, truth: Truth) -> None:
    first, second = halves(truth[1][0])
    with Client(str(server.base_url)) as client:
        before = score(client, old)
        assert send(server, list(first.items())).json()["is_complete"] is False
        with pytest.raises(WeightsBusyError, match="must be whole, got a push of transformer with 37 of 73 tensors"):
            score(client, old)
        send(server, list(second.items())).raise_for_status()
        assert not torch.equal(score(client, old), before)


def score(client: Client, rollout: Rollout) -> Tensor:
    return client.score([rollout], log_probs_only=True).log_probs


def test_buckets_of_an_update_that_was_begun_change_nothing_before_its_commit(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    engine, (tensors, new, _) = service.engine, truth[1]
    first, second = halves(tensors)
    update_id = server.post("/weights/begin", json={"weight_version": "9"}).json()["update_id"]
    answer = send(server, {"transformer": flattened(first)}, load_format="flattened_bucket", update_id=update_id)
    assert answer.json()["is_complete"] is False and answer.json()["weight_version"] == "kept"
    assert answer.json()["message"].startswith("37 of 73 tensors have arrived")
    assert not is_holding(server) and engine.weights_checksum() == truth[0][2]
    assert_same_bits(engine.rollout(**REQUEST)[0], old)
    # Two at once would be two sets of weights; a bucket without the id is none of this update.
    segments = own_segments()
    own = tensors["x_pad_token"].clone()
    answer = send(server, [("x_pad_token", own)])
    assert (answer.status_code, error_of(answer)["code"]) == (409, "weights_busy")
    del own
    # The server lets go of what it refused at about the time of its answer.
    until(lambda: own_segments() <= segments)
    assert error_of(send(server, list(first.items()), update_id=update_id))["code"] == "weights_rejected"
    assert send(server, list(second.items()), update_id=update_id).json()["num_arrived"] == 73
    for wrong, status, field in (
        ({"update_id": "0" * 16}, 404, "update_id"),
        ({"update_id": update_id, "target_modules": ["vae"]}, 422, "target_modules"),
        ({"update_id": update_id, "weight_version": "9"}, 422, "weight_version"),
        ({"update_id": update_id, "mode": "abort"}, 422, "mode"),
    ):
        answer = send(server, [], **wrong)
        assert (answer.status_code, error_of(answer)["field"]) == (status, field), answer.text
    server.post(f"/weights/{update_id}/commit").raise_for_status()
    assert_same_bits(engine.rollout(**REQUEST)[0], new)
    assert engine.weight_version == "9"


class _Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


def test_anything_else_is_refused_by_name(server: httpx.Client, service: EngineService, old: Rollout, tmp_path: Path) -> None:
    before = service.engine.weight_version, service.engine.weights_checksum()
    answer = send(server, pickle.dumps(_Evil(tmp_path / "run")))
    assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
    assert "posix.system" in error_of(answer)["message"]
    assert not (tmp_path / "run").exists()
    none = [text([])]
    for body, status, field in (
        ({}, 422, "serialized_named_tensors"),
        ({"serialized_named_tensors": []}, 422, "serialized_named_tensors"),
        ({"serialized_named_tensors": ["?"]}, 400, "serialized_named_tensors"),
        ({"serialized_named_tensors": ["AAAA"]}, 400, "serialized_named_tensors"),
        ({"serialized_named_tensors": none, "load_format": "auto"}, 422, "load_format"),
        ({"serialized_named_tensors": none, "target_modules": ["text_encoder"]}, 422, "target_modules"),
        ({"serialized_named_tensors": none, "target_modules": ["transformer", "vae"]}, 422, "target_modules"),
        ({"serialized_named_tensors": none, "weight_version": ""}, 422, "weight_version"),
        ({"serialized_named_tensors": none, "load_format": "flattened_bucket"}, 400, "serialized_named_tensors"),
        ({"serialized_named_tensors": none, "payload_gpu_uuids": ["GPU-1", "GPU-2"]}, 422, "payload_gpu_uuids"),
        ({"serialized_named_tensors": none, "payload_gpu_uuids": "GPU-1"}, 422, "payload_gpu_uuids"),
        ({"serialized_named_tensors": none, "weight_update_mode": "merge"}, 422, "weight_update_mode"),
        ({"serialized_named_tensors": none, "lora_alpha": 8}, 422, "lora_alpha"),
        ({"serialized_named_tensors": none, "lora_rank": 8}, 422, "lora_rank"),
        ({"serialized_named_tensors": none, "weight_update_mode": "lora_merge", "lora_rank": 0}, 422, "lora_rank"),
        ({"serialized_named_tensors": none, "weight_update_mode": "lora_merge", "lora_alpha": 0}, 422, "lora_alpha"),
        (
            {"serialized_named_tensors": none, "weight_update_mode": "lora_merge", "target_modules": ["vae"]},
            422,
            "target_modules",
        ),
        ({"serialized_named_tensors": none, "weight_update_mode": "lora_merge", "update_id": "a"}, 422, "update_id"),
    ):
        answer = server.post(ROUTE, json=body)
        assert (answer.status_code, error_of(answer)["field"]) == (status, field), answer.text
    assert (service.engine.weight_version, service.engine.weights_checksum()) == before


def test_without_leave_nothing_is_read(service: EngineService) -> None:
    with serving(service) as server:
        answer = send(server, [])
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
        assert "--allow-pickle-weights" in error_of(answer)["message"]


def test_a_server_on_a_gpu_reads_the_payload_of_its_own() -> None:
    from flowroll.errors import InvalidRequestError
    from flowroll.serving.routers import shared_tensors

    own = "aaaa-1"
    assert shared_tensors._own_entry(["GPU-AAAA-0", "GPU-AAAA-1"], own) == 1
    assert shared_tensors._own_entry(["MIG-aaaa-1", "aaaa-0"], own) == 0
    assert shared_tensors._own_entry(None, own) == 0
    assert shared_tensors._own_entry(["GPU-aaaa-0"], None) == 0
    with pytest.raises(InvalidRequestError, match="server's GPU, which is aaaa-1, got aaaa-0"):
        shared_tensors._own_entry(["GPU-aaaa-0"], own)


def sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    import hashlib

    return {
        name: hashlib.sha256(
            str(tensor.dtype).encode() + repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def test_the_checker_compares_what_it_is_asked_for(
    server: httpx.Client, service: EngineService, old: Rollout, truth: Truth
) -> None:
    def check(expected: object, module: str = "transformer") -> tuple[int, dict[str, Any]]:
        answer = server.post(CHECKER, json={"target_module": module, "expected_named_tensors_sha256": expected})
        return answer.status_code, answer.json()

    expected = sums(truth[0][0])
    found = {"success": True, "message": "Verified module 'transformer' update for 73 tensor(s)."}
    assert check(expected) == (200, found)
    some = dict(list(expected.items())[:2])
    assert check(some) == (200, {"success": True, "message": "Verified module 'transformer' update for 2 tensor(s)."})
    first, second = list(some)
    status, answer = check({**some, second: "0" * 64, "no.such": "0" * 64})
    assert status == 400 and answer == {
        "success": False,
        "message": "Module 'transformer' update weight check failed: missing 1 tensor(s): no.such; checksum mismatch for "
        f"1 tensor(s): {second}",
    }
    status, answer = check(dict.fromkeys(expected, "0" * 64))
    assert status == 400 and answer["message"].endswith(", ... (+68 more)")
    send(server, [(first, truth[1][0][first])])
    assert check({first: expected[first]})[0] == 400 and check(sums({first: truth[1][0][first]}))[0] == 200
    vae = service.engine._pipeline.vae.state_dict()
    assert check(sums(vae), "vae")[0] == 200
    for body, field in (
        ({"expected_named_tensors_sha256": some}, "target_module"),
        ({"target_module": "transformer"}, "expected_named_tensors_sha256"),
        ({"target_module": "transformer", "expected_named_tensors_sha256": {}}, "expected_named_tensors_sha256"),
        ({"target_module": "transformer", "expected_named_tensors_sha256": {"a": 1}}, "expected_named_tensors_sha256"),
        ({"target_module": "scheduler", "expected_named_tensors_sha256": some}, "target_module"),
    ):
        answered = server.post(CHECKER, json=body)
        assert answered.status_code == 422 and error_of(answered)["field"].startswith(field), answered.text
