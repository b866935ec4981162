"""New weights from a process group: as a fresh start on them, or not at all, whoever dies where."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from tests.rollouts import assert_same_bits
from tests.serving.servers import WAIT_S, error_of, serving, until
from tests.serving.test_tensor_routes import free
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.client import Client
from flowroll.client.weight_group import WeightGroup
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError, NotFoundError, WeightsBusyError, WeightsRejectedError
from flowroll.parallel.broadcasting import BroadcastGroup
from flowroll.parallel.group_process import GroupProcess
from flowroll.parallel.shared_memory import SharedMemory
from flowroll.serving.routers import weight_group
from flowroll.wire.schema import parse_json_body

Truth = list[tuple[dict[str, Tensor], Rollout, str]]
INIT, UPDATE, DESTROY = "/init_weights_update_group", "/update_weights_from_distributed", "/destroy_weights_update_group"


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


@pytest.fixture(scope="module")
def truth(z_image_checkpoint: Path, other: Path) -> Truth:
    """Weights, rollout and checksum, for the old and for the new weights."""
    found = []
    for folder in (z_image_checkpoint, other):
        with Engine(folder, device="cpu") as engine:
            (rollout,) = engine.rollout(**REQUEST)
            found.append((load_file(folder / "transformer" / WEIGHTS), rollout, engine.weights_checksum()))
    return found


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[EngineService]:
    with EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, rank_timeout_s=20.0, weights_idle_s=0.5) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[Client]:
    with Client(str(server.base_url)) as client:
        yield client


@pytest.fixture
def old(engine: Engine, truth: Truth) -> Rollout:
    """The engine has the old weights, as version "kept"."""
    engine.update_weights_from_tensors(truth[0][0], weight_version="kept")
    return truth[0][1]


def assert_untouched(engine: Engine, truth: Truth) -> None:
    assert engine.weights_checksum() == truth[0][2]
    (after,) = engine.rollout(**REQUEST)
    assert_same_bits(after, truth[0][1])
    assert after.weight_version == engine.weight_version == "kept"


def test_broadcast_weights_give_the_rollouts_of_an_engine_started_on_them(
    client: Client, engine: Engine, truth: Truth, old: Rollout
) -> None:
    (before, _, old_sum), (tensors, new, new_sum) = truth
    with WeightGroup([client], timeout_s=20.0) as group:
        assert group.update_weights(tensors, weight_version="7", bucket_bytes=10**6) == ["7"]
        (got,) = engine.rollout(**REQUEST)
        assert_same_bits(got, new)
        assert got.weight_version == "7" and engine.weights_checksum() == new_sum
        assert group.update_weights(iter(before.items())) == ["8"]
        assert engine.weights_checksum() == old_sum
        assert not torch.distributed.is_initialized()
        name = group._name
    with pytest.raises(WeightsRejectedError, match="make another"):
        group.update_weights(tensors)
    answer = httpx.post(f"{client._http.base_url}{DESTROY}", json={"group_name": name})
    assert (answer.status_code, error_of(answer)["field"]) == (404, "group_name")


def foreign_trainer(server: httpx.Client, other: Path, *, flattened: bool, last: int = -1) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("foreign_trainer.py")
    weights = other / "transformer" / WEIGHTS
    command = [sys.executable, str(script), str(server.base_url), str(weights), str(flattened), str(last)]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_S)


@pytest.mark.parametrize("flattened", [False, True])
def test_a_trainer_that_makes_its_group_with_torchs_helper_is_met(
    flattened: bool, server: httpx.Client, engine: Engine, other: Path, truth: Truth, old: Rollout
) -> None:
    trainer = foreign_trainer(server, other, flattened=flattened)
    assert trainer.returncode == 0, trainer.stderr
    assert "foreign is destroyed" in trainer.stdout
    assert engine.weight_version == "foreign" and engine.weights_checksum() == truth[1][2]


def test_a_trainer_that_is_killed_in_the_middle_leaves_whole_buckets_and_a_group_that_can_be_destroyed(
    server: httpx.Client, engine: Engine, other: Path, truth: Truth, old: Rollout
) -> None:
    # In the last bucket, of which some tensors have arrived; the first was put in place, as its answer has said.
    trainer = foreign_trainer(server, other, flattened=False, last=60)
    assert trainer.returncode == 9, trainer.stderr
    names = list(truth[1][0])[::2]
    live = engine._model.transformer.state_dict()
    until(lambda: "flowroll_is_holding 0" in server.get("/metrics").text)
    for name in live:
        assert torch.equal(live[name], truth[name in names][0][name]), name
    assert engine.weight_version == "foreign"
    body = {"names": ["x_pad_token"], "dtypes": ["float32"], "shapes": [[1, 64]], "group_name": "foreign"}
    answer = server.post(UPDATE, json=body)
    assert (answer.status_code, error_of(answer)["field"]) == (422, "group_name")
    answer = server.post(DESTROY, json={"group_name": "foreign"})
    assert answer.json() == {"success": True, "message": "foreign is destroyed"}


@pytest.mark.parametrize("fault", ["shape", "name", "dtype", "missing"])
def test_a_refused_bucket_leaves_everything_and_is_never_taken_for_the_next(
    fault: str, client: Client, server: httpx.Client, engine: Engine, truth: Truth, old: Rollout
) -> None:
    tensors = dict(truth[1][0])
    name = list(tensors)[-1]
    if fault == "shape":
        tensors[name] = torch.zeros(7)
    elif fault == "name":
        tensors["no.such"] = torch.zeros(7)
    elif fault == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    else:
        del tensors[name]
    free(server)
    with WeightGroup([client], timeout_s=20.0) as group:
        with pytest.raises(InvalidRequestError if fault == "dtype" else WeightsRejectedError):
            group.update_weights(tensors, bucket_bytes=10**6)
        assert_untouched(engine, truth)
        if fault != "missing":
            # What was broadcast and not received would come first.
            with pytest.raises(WeightsRejectedError, match="make another"):
                group.update_weights(truth[1][0])
    assert_untouched(engine, truth)


def test_a_server_that_is_busy_leaves_the_others_free(
    service: EngineService, engine: Engine, truth: Truth, old: Rollout
) -> None:
    # Each server is a member of its own; the engine is the fixture's to close.
    other = EngineService(engine, max_queue=4)
    with (
        serving(service) as free_one,
        serving(other) as busy_one,
        Client(str(free_one.base_url)) as first,
        Client(str(busy_one.base_url)) as second,
        WeightGroup([first, second], timeout_s=20.0) as group,
    ):
        begun = busy_one.post("/weights/begin").json()["update_id"]
        with pytest.raises(WeightsBusyError):
            group.update_weights(truth[1][0])
        assert_untouched(engine, truth)
        busy_one.post(f"/weights/{begun}/abort").raise_for_status()
        assert group.update_weights(truth[1][0], weight_version="9") == ["9", "9"]
    assert engine.weights_checksum() == truth[1][2]


@pytest.mark.parametrize(
    ("change", "status"), [({"shapes": [[7]]}, 422), ({"names": ["no.such"]}, 422), ({"dtypes": ["int8"]}, 422), ({}, 409)]
)
def test_a_group_whose_bucket_was_refused_receives_nothing_more(
    change: dict[str, Any], status: int, client: Client, server: httpx.Client, engine: Engine, truth: Truth, old: Rollout
) -> None:
    free(server)
    with WeightGroup([client], timeout_s=20.0) as group:
        good = {"names": ["x_pad_token"], "dtypes": ["float32"], "shapes": [[1, 64]], "group_name": group._name}
        begun = None if change else server.post("/weights/begin").json()["update_id"]
        assert server.post(UPDATE, json={**good, **change}).status_code == status
        if begun:
            server.post(f"/weights/{begun}/abort")
        # The trainer has sent it all the same: its bytes would be taken for these.
        answer = server.post(UPDATE, json=good)
        assert answer.status_code == 422
        assert "got a bucket that was refused; destroy it and make another" in error_of(answer)["message"]
    assert_untouched(engine, truth)


def test_a_trainer_that_falls_silent_is_waited_for_no_longer_than_is_said(
    service: EngineService, engine: Engine, truth: Truth, old: Rollout
) -> None:
    with serving(service, rank_timeout_s=1.0) as server, Client(str(server.base_url)) as client:
        with WeightGroup([client], timeout_s=20.0) as group:
            body = {"names": ["x_pad_token"], "dtypes": ["float32"], "shapes": [[1, 64]], "group_name": group._name}
            answer = server.post(UPDATE, json=body)
            assert (answer.status_code, error_of(answer)["field"]) == (422, "group_name")
            assert "must deliver every tensor" in error_of(answer)["message"]
        place = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
        answer = server.post(INIT, json=place)
        assert (answer.status_code, error_of(answer)["field"]) == (422, "master_address")
        assert "start all of them within 1 s" in error_of(answer)["message"]
    assert_untouched(engine, truth)


def test_a_broadcast_that_waits_ends_with_its_group(
    client: Client, server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WeightGroup([client], timeout_s=6.0) as group:
        free(server)
        begun = server.post("/weights/begin").json()["update_id"]
        body = {"names": ["x_pad_token"], "dtypes": ["float32"], "shapes": [[1, 64]], "group_name": group._name}
        body["update_id"] = begun
        answers: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.base_url}{UPDATE}", json=body, timeout=60))
        )
        receive, entered = GroupProcess.receive, threading.Event()

        def noted(self: GroupProcess, sizes: Sequence[int]) -> SharedMemory:
            entered.set()
            return receive(self, sizes)

        monkeypatch.setattr(GroupProcess, "receive", noted)
        waiting.start()
        assert entered.wait(WAIT_S)
        # Longer than an update may be silent: it waits for the trainer, who may take as long as the group allows.
        waiting.join(1.0)
        assert server.post("/weights/begin").status_code == 409
        assert server.post(DESTROY, json={"group_name": group._name}).status_code == 200
        waiting.join(WAIT_S)
        assert (answers[0].status_code, error_of(answers[0])["field"]) == (422, "group_name")
        assert server.post(f"/weights/{begun}/abort").status_code == 200


def test_a_bucket_of_a_group_that_was_left_does_not_end_the_next_of_its_name(
    client: Client,
    server: httpx.Client,
    service: EngineService,
    truth: Truth,
    old: Rollout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowroll.client.weight_group.secrets", SimpleNamespace(token_hex=lambda count: "same"))
    free(server)
    WeightGroup([client], timeout_s=20.0)
    former = service.find_group("flowroll-same")
    with WeightGroup([client], timeout_s=20.0) as group:
        service.fail_group("flowroll-same", former)
        with pytest.raises(NotFoundError, match="group_name must be of a group"):
            service.fill_from_group(
                service.open_update("vae", partial=True).update_id, "flowroll-same", former, [], flattened=False
            )
        group.update_weights(truth[0][0])


def test_groups_are_bounded_and_those_that_are_of_no_use_make_room(service: EngineService) -> None:
    with (
        serving(EngineService(service.engine, max_queue=4, max_groups=2), rank_timeout_s=20.0) as server,
        Client(str(server.base_url)) as client,
    ):
        free(server)
        failed, kept = (WeightGroup([client], timeout_s=20.0) for _ in range(2))
        with pytest.raises(WeightsBusyError, match=r"at most 2 process groups, .*; destroy one of them first"):
            WeightGroup([client], timeout_s=5.0)
        body = {"names": ["no.such"], "dtypes": ["float32"], "shapes": [[1]], "group_name": failed._name}
        assert server.post(UPDATE, json=body).status_code == 422
        killed = WeightGroup([client], timeout_s=20.0)
        # As the end of its process would: without a word to the server.
        assert killed._group is not None
        killed._group.close()
        killed._store = None

        def joins() -> bool:
            try:
                WeightGroup([client], timeout_s=5.0).close()
            except WeightsBusyError:
                return False
            return True

        until(joins)
        left = [server.post(DESTROY, json={"group_name": group._name}).status_code for group in (failed, killed, kept)]
        assert left == [404, 404, 200]
        for group in (failed, kept, killed):
            group.close()


def test_the_end_of_the_server_is_the_end_of_its_groups(service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    close = GroupProcess.close

    def noted(self: GroupProcess, reason: str = "its end") -> None:
        closed.append(self.name)
        close(self, reason)

    monkeypatch.setattr(GroupProcess, "close", noted)
    with ExitStack() as clients:
        with serving(service, rank_timeout_s=20.0) as server:
            group = WeightGroup([clients.enter_context(Client(str(server.base_url)))], timeout_s=20.0)
        assert closed == [group._name]
        group.close()


def test_a_trainer_whose_server_does_not_come_leaves_nothing_behind(
    server: httpx.Client, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[BroadcastGroup] = []

    class Late(BroadcastGroup):
        """Is there when the trainer has given up."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            refused.wait(WAIT_S)
            super().__init__(*arguments, **options)
            made.append(self)

    refused = threading.Event()
    monkeypatch.setattr("flowroll.client.weight_group.BroadcastGroup", Late)
    post = WeightGroup._post

    def refuse(self: WeightGroup, to: Client, route: str, sent: Any) -> Any:
        future = post(self, to, route, sent)
        if route == INIT:
            failed: Future[Any] = Future()
            failed.set_exception(InvalidRequestError("no"))
            return failed
        refused.set()
        return future

    monkeypatch.setattr(WeightGroup, "_post", refuse)
    with pytest.raises(InvalidRequestError):
        WeightGroup([client], timeout_s=5.0)
    until(lambda: bool(made) and made[0].has_failed)


GOOD = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
BUCKET = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        (INIT, {}, 422, "master_address"),
        (INIT, {**GOOD, "master_port": 0}, 422, "master_port"),
        (INIT, {**GOOD, "rank_offset": 2}, 422, "rank_offset"),
        (INIT, {**GOOD, "rank_offset": 0}, 422, "rank_offset"),
        (INIT, {**GOOD, "world_size": 1}, 422, "world_size"),
        (INIT, {**GOOD, "backend": "mpi"}, 422, "backend"),
        (INIT, {**GOOD, "backend": "nccl"}, 422, "backend"),
        (INIT, {**GOOD, "group_name": ""}, 422, "group_name"),
        (UPDATE, BUCKET, 404, "group_name"),
        (DESTROY, {}, 404, "group_name"),
        (DESTROY, {"name": "x"}, 422, "name"),
    ],
)
def test_bad_requests_are_refused_by_name(server: httpx.Client, path: str, body: Any, status: int, field: str) -> None:
    answer = server.post(path, json=body)
    assert (answer.status_code, error_of(answer)["field"]) == (status, field), answer.text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"names": []}, "names"),
        ({"dtypes": []}, "dtypes"),
        ({"dtypes": ["int8"]}, "dtypes"),
        ({"shapes": [[1], [1]]}, "shapes"),
        ({"shapes": [[-1]]}, "shapes"),
        ({"load_format": "auto"}, "load_format"),
        ({"weight_version": ""}, "weight_version"),
        ({"target_modules": ["text_encoder"]}, "target_modules"),
    ],
)
def test_a_bad_bucket_is_refused_by_name(change: Any, field: str) -> None:
    from flowroll.wire.group import UpdateFromGroupRequest
    from flowroll.wire.schema import parse

    parse(UpdateFromGroupRequest, dict(BUCKET))
    with pytest.raises(InvalidRequestError) as refused:
        parse(UpdateFromGroupRequest, {**BUCKET, **change})
    assert refused.value.field is not None and refused.value.field.startswith(field)


def test_a_bucket_is_parsed_beside_the_event_loop(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    looped = []

    def watched(body: Any) -> Any:
        try:
            asyncio.get_running_loop()
            looped.append(True)
        except RuntimeError:
            looped.append(False)
        return parse_json_body(body)

    monkeypatch.setattr(weight_group, "parse_json_body", watched)
    assert server.post(UPDATE, json={**BUCKET, "group_name": ["none"]}).status_code == 404
    assert looped == [False]
