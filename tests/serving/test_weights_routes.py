"""Weights over HTTP: who may have what read, what is answered, and what a refused update leaves."""

import asyncio
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.rollouts import assert_same_bits
from tests.serving.servers import SMALL, WAIT_S, Background, Gate, HookedEngine, error_of, serving, until
from tests.weights import REQUEST, WEIGHTS, with_other

from flowroll import Rollout, replay
from flowroll.client import AsyncClient, Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import ForbiddenError, OutdatedWeightsError, WeightsMismatchError, WeightsRejectedError
from flowroll.serving.paths import allowed_path

UPDATE = "/update_weights_from_disk"


@pytest.fixture(scope="module")
def root(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer saves to; read only."""
    root = tmp_path_factory.mktemp("weights")
    with_other(z_image_checkpoint, root / "good")
    shutil.copytree(root / "good" / "transformer", root / "cut")
    os.truncate(root / "cut" / WEIGHTS, (root / "cut" / WEIGHTS).stat().st_size - 4)
    (root / "link-in").symlink_to(root / "good")
    return root


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[HookedEngine]:
    with HookedEngine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: HookedEngine, root: Path) -> Iterator[httpx.Client]:
    with EngineService(engine, max_queue=4) as service, serving(service, weights_roots=(str(root),)) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[Client]:
    with Client(str(server.base_url)) as client:
        yield client


def test_an_update_over_http_gives_the_rollouts_of_an_engine_started_on_the_new_weights(
    client: Client, server: httpx.Client, engine: Engine, root: Path
) -> None:
    with Engine(root / "good", device="cpu") as fresh:
        (expected,) = fresh.rollout(**REQUEST)
        sums, checksum = replay.tensor_checksums(fresh._model.transformer), fresh.weights_checksum()
    (old,) = client.rollout(**REQUEST)
    update = client.update_weights_from_disk(root / "good", weight_version="120")
    assert (update.previous_version, update.weight_version, update.num_tensors) == (old.weight_version, "120", 73)
    (new,) = client.rollout(**REQUEST, min_weight_version="120")
    assert_same_bits(new, expected)
    assert new.weight_version == "120" == client.server_info()["weight_version"]
    assert client.weights_checksum() == checksum
    assert client.verify_weights(sums) == 73
    with pytest.raises(WeightsMismatchError, match="missing: x_pad_token"):
        client.verify_weights({name: digest for name, digest in sums.items() if name != "x_pad_token"})
    with pytest.raises(OutdatedWeightsError):
        client.rollout(**REQUEST, min_weight_version="121")
    answer = server.post("/rollout/generate", json={**SMALL, "min_weight_version": "121"})
    assert (answer.status_code, error_of(answer)["field"]) == (409, "min_weight_version")


def test_the_asynchronous_client_does_the_same(client: Client, server: httpx.Client, root: Path) -> None:
    async def run() -> tuple[str, str]:
        async with AsyncClient(str(server.base_url)) as other:
            update = await other.update_weights_from_disk(root / "good")
            with pytest.raises(WeightsMismatchError):
                await other.verify_weights({})
            return update.weight_version, await other.weights_checksum("vae")

    version, checksum = asyncio.run(run())
    assert (version, checksum) == (client.server_info()["weight_version"], client.weights_checksum("vae"))


def test_a_trainer_of_sglang_is_understood(server: httpx.Client, root: Path) -> None:
    body = {"model_path": str(root / "good"), "flush_cache": True, "target_modules": ["transformer"]}
    answer = server.post(UPDATE, json=body)
    assert answer.status_code == 200 and answer.json()["success"] is True
    assert "transformer is of version" in answer.json()["message"]
    sums = server.post("/get_weights_checksum", json={}).json()
    assert list(sums) == ["transformer", "text_encoder", "vae"]
    assert server.post("/get_weights_checksum", json={"module_names": ["vae"]}).json() == {"vae": sums["vae"]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "model_path"),
        ({"model_path": ""}, "model_path"),
        ({"model_path": "x" * 5000}, "model_path"),
        ({"model_path": 3}, "model_path"),
        ({"model_path": "good"}, "model_path"),
        ({"model_path": "/x", "module": "text_encoder"}, "module"),
        ({"model_path": "/x", "module": "vae", "target_modules": ["vae"]}, "target_modules"),
        ({"model_path": "/x", "target_modules": ["vae", "transformer"]}, "target_modules"),
        ({"model_path": "/x", "target_modules": []}, "target_modules"),
        ({"model_path": "/x", "weight_version": 3}, "weight_version"),
        ({"model_path": "/x", "weight_version": "a\nb"}, "weight_version"),
        ({"model_path": "/x", "flush_cache": 1}, "flush_cache"),
        ({"model_path": "/x", "load_format": None}, "load_format"),
    ],
)
def test_a_bad_update_request_is_refused_by_name(server: httpx.Client, body: dict[str, Any], field: str) -> None:
    answer = server.post(UPDATE, json=body)
    assert (answer.status_code, error_of(answer)["field"]) == (422, field)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/get_weights_checksum", {"module_names": ["scheduler"]}, "module_names"),
        ("/get_weights_checksum", {"module_names": []}, "module_names"),
        ("/get_weights_checksum", {"modules": []}, "modules"),
        ("/verify_weights", {}, "expected"),
        ("/verify_weights", {"expected": {"a": 3}}, "expected"),
        ("/verify_weights", {"expected": {}, "module": "unet"}, "module"),
    ],
)
def test_bad_questions_about_weights_are_refused_by_name(
    server: httpx.Client, path: str, body: dict[str, Any], field: str
) -> None:
    answer = server.post(path, json=body)
    assert (answer.status_code, error_of(answer)["field"]) == (422, field)


def test_a_tensor_that_is_named_twice_is_an_error_that_lists_it(server: httpx.Client, engine: Engine) -> None:
    expected = json.dumps(replay.tensor_checksums(engine._model.transformer))
    twice = expected[:-1] + ', "x_pad_token": "0"}'
    headers = {"content-type": "application/json"}
    answer = server.post("/verify_weights", content=f'{{"expected": {twice}}}', headers=headers)
    assert answer.status_code == 409 and "doubled: x_pad_token" in error_of(answer)["message"]


def test_a_refused_update_leaves_the_next_rollout_as_it_was(client: Client, server: httpx.Client, root: Path) -> None:
    (old,) = client.rollout(**REQUEST)
    checksum, version = client.weights_checksum(), client.server_info()["weight_version"]
    with pytest.raises(WeightsRejectedError, match="truncated"):
        client.update_weights_from_disk(root / "cut")
    with pytest.raises(WeightsRejectedError, match="none"):
        client.update_weights_from_disk(root)
    (new,) = client.rollout(**REQUEST)
    assert_same_bits(new, old)
    assert (client.weights_checksum(), client.server_info()["weight_version"]) == (checksum, version)
    assert new.weight_version == version


def test_a_server_without_roots_reads_nothing_and_says_how_to_allow_it(service: EngineService, root: Path) -> None:
    with serving(service) as client:
        answer = client.post(UPDATE, json={"model_path": str(root / "good")})
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
        assert "start it with --weights-root DIR" in error_of(answer)["message"]


def test_the_token_guards_weights(service: EngineService, root: Path) -> None:
    with serving(service, api_key="s3cret", weights_roots=(str(root),)) as client:
        for path in (UPDATE, "/get_weights_checksum", "/verify_weights"):
            assert client.post(path, json={"model_path": str(root / "good")}).status_code == 401


@pytest.fixture(scope="module")
def outside(root: Path, z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that would do, where no client may have them read; and links to them from inside."""
    outside = tmp_path_factory.mktemp("outside")
    with_other(z_image_checkpoint, outside / "good", factor=1.02)
    twin = Path(f"{root}-twin")
    shutil.copytree(outside / "good" / "transformer", twin)
    (root / "link-out").symlink_to(outside / "good")
    (root / "link-up").symlink_to("..")
    (root / "loop").symlink_to(root / "loop")
    weights = outside / "good" / "transformer"
    for name, linked in (("file-link", WEIGHTS), ("config-link", "config.json")):
        shutil.copytree(weights, root / name)
        (root / name / linked).unlink()
        (root / name / linked).symlink_to(weights / linked)
    (root / "module-link").mkdir()
    (root / "module-link" / "transformer").symlink_to(weights)
    return outside


HOSTILE = [
    "{outside}/good",
    "{outside}/good/transformer/diffusion_pytorch_model.safetensors",
    "{outside}/not/there",
    "{root}/../{outside_name}/good",
    "{root}/good/../../{outside_name}/good",
    "{root}/./good/./../../{outside_name}/./good",
    "{root}//..//{outside_name}//good",
    "{root}-twin",
    "{root}/link-out",
    "{root}/link-out/transformer",
    "{root}/link-out/transformer/diffusion_pytorch_model.safetensors",
    "{root}/link-up/{outside_name}/good",
    "{root}/file-link",
    "{root}/config-link",
    "{root}/module-link",
    "{root}/loop",
    "{root}/..",
    "/",
    "//",
    "/etc/passwd",
    "/proc/self/root{outside}/good",
    "/proc/self/environ",
    "/dev/zero",
    "/dev/stdin",
    "{root}/good\0/../../{outside_name}/good",
    "{root}/\ud800",
    "{root}/" + "a" * 3000,
]


@pytest.mark.parametrize("path", HOSTILE, ids=range(len(HOSTILE)))
def test_no_path_leads_out_of_the_roots(
    path: str, server: httpx.Client, client: Client, engine: Engine, root: Path, outside: Path
) -> None:
    version, checksum = engine.weight_version, engine.weights_checksum()
    sent = path.replace("{root}", str(root)).replace("{outside}", str(outside)).replace("{outside_name}", outside.name)
    answer = server.post(UPDATE, content=json.dumps({"model_path": sent}), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 403, 422), answer.text
    if "\ud800" not in sent and "a" * 3000 not in sent:
        assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden")
        # Nothing of what is there, or not there, outside.
        assert re.fullmatch(
            r"model_path must lead into a folder of --weights-root, got .*; save the weights there\.",
            error_of(answer)["message"],
            re.DOTALL,
        )
    assert (engine.weight_version, engine.weights_checksum()) == (version, checksum)


def test_a_link_inside_a_root_is_followed(client: Client, root: Path) -> None:
    assert client.update_weights_from_disk(root / "link-in").num_tensors == 73


def test_a_root_that_is_a_link_is_what_it_leads_to(root: Path, tmp_path: Path) -> None:
    from flowroll.serving import ServerConfig

    (tmp_path / "root").symlink_to(root)
    config = ServerConfig(model="x", weights_roots=(str(tmp_path / "root"),))
    assert config.weights_roots == (str(root.resolve()),)
    assert allowed_path(str(tmp_path / "root" / "good"), config.weights_roots) == (root / "good").resolve()
    with pytest.raises(ForbiddenError):
        allowed_path(str(tmp_path), config.weights_roots)


def test_an_update_waits_for_the_running_request_and_goes_before_those_that_wait(
    engine: HookedEngine, server: httpx.Client, client: Client, root: Path
) -> None:
    engine.hook = gate = Gate()
    try:
        answers: list[list[Rollout]] = [[], []]

        def roll(index: int) -> None:
            with Client(str(server.base_url), timeout_s=WAIT_S) as own:
                answers[index] = own.rollout(**REQUEST)

        threads = [threading.Thread(target=roll, args=(index,)) for index in range(2)]
        threads[0].start()
        assert gate.entered.wait(WAIT_S)
        threads[1].start()
        until(lambda: client.server_info()["queue"]["pending"] == 1)
        before = client.server_info()["weight_version"]
        update = Background(lambda: server.post(UPDATE, json={"model_path": str(root / "good"), "weight_version": "next"}))
        update._thread.join(0.5)
        assert client.server_info()["weight_version"] == before
        gate.opened.set()
        assert update.answer().json()["previous_version"] == before
        for thread in threads:
            thread.join(WAIT_S)
    finally:
        engine.hook = lambda plan: None
    assert [answer[0].weight_version for answer in answers] == [before, "next"]


def test_metrics_tell_of_updates(client: Client, root: Path) -> None:
    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    done, failed = (f'flowroll_weight_updates_total{{outcome="{outcome}"}}' for outcome in ("completed", "failed"))
    before = value(done), value(failed), value("flowroll_weight_pause_seconds_total")
    client.update_weights_from_disk(root / "good", weight_version='a"b')
    with pytest.raises(WeightsRejectedError):
        client.update_weights_from_disk(root / "cut")
    assert value(done) == before[0] + 1 and value(failed) == before[1] + 1
    assert value("flowroll_weight_pause_seconds_total") > before[2]
    assert value('flowroll_weights_info{version="a\\"b"}') == 1
