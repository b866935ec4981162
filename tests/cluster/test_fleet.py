"""Two replicas at one address: every answer is that of a single engine, and what changes one of them changes all."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file
from tests.adapters import policy
from tests.rollouts import assert_same_bits
from tests.serving.test_vllm_routes import SyncClient, halves, joined, send
from tests.weights import WEIGHTS, change, with_other

from flowroll import Client, Engine, Rollout, cluster
from flowroll.checkpoints import shapes_checkpoint
from flowroll.cli.dashboard import Scrape
from flowroll.cli.top import top
from flowroll.client.weight_group import WeightGroup
from flowroll.engine import BatchLimits
from flowroll.errors import (
    AsleepError,
    CancelledRequestError,
    ForbiddenError,
    InvalidRequestError,
    OutdatedWeightsError,
    PausedError,
    WeightsRejectedError,
)

MODEL = shapes_checkpoint("z_image")
WAIT_S = 90.0
ASKED: dict[str, Any] = {
    "prompt": "a red circle in the center",
    "num_inference_steps": 3,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
# Larger than a batch, so that two replicas run it.
SPLIT: dict[str, Any] = {**ASKED, "seed": 11, "num_outputs_per_prompt": 7}
LONG: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 1000, "num_outputs_per_prompt": 4}


@pytest.fixture(scope="module")
def local() -> Iterator[Engine]:
    with Engine(MODEL, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def served(ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("weights")
    with cluster.serve(
        MODEL,
        replicas=2,
        threads=1,
        device="cpu",
        port=0,
        weights_roots=(str(root), str(MODEL)),
        # Fewer samples run at a time than a large request has.
        batching=BatchLimits(max_batch_samples=4, max_running_samples=8),
    ) as served:
        served.root = root
        yield served


@pytest.fixture
def client(served: Any) -> Iterator[Client]:
    with Client(served.url, timeout_s=WAIT_S) as client:
        yield client


def until(is_so: Any) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def all_ready(served: Any, count: int = 2) -> bool:
    return [one.state for one in served.fleet.describe().replicas] == ["ready"] * count


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def requests(count: int) -> list[dict[str, Any]]:
    """Requests of several sizes, steps and dynamics; some are larger than a batch."""
    drawn = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        samples, steps, kind = (int(torch.randint(high, (1,), generator=drawn)) for high in (7, 3, 3))
        found.append(
            {
                **ASKED,
                "prompt": ("a red circle in the center", "a blue square at the top left")[number % 2],
                "seed": 100 * number,
                "num_outputs_per_prompt": 1 + samples,
                "num_inference_steps": 2 + steps,
                "rollout_sde_type": ("sde", "cps", "ode")[kind],
                "guidance_scale": (0, 3)[number % 3 == 0],
            }
        )
    return found


def check_mixed(served: Any, local: Engine, count: int) -> None:
    asked = requests(count)
    with Client(served.url, timeout_s=WAIT_S) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: client.rollout(**one), asked))
    for one, found in zip(asked, answers, strict=True):
        assert_same(found, local.rollout(**one))


def test_mixed_requests_have_the_bits_of_a_single_engine(served: Any, local: Engine):
    check_mixed(served, local, 12)
    assert served.fleet.describe().num_split > 0


def test_a_large_group_is_split_and_its_answer_is_that_of_one_engine(served: Any, client: Client, local: Engine):
    before = served.fleet.describe().num_split
    found, expected = client.rollout(**SPLIT, request_id="one"), local.rollout(**SPLIT)
    assert_same(found, expected)
    assert [one.seed for one in found] == list(range(11, 18)) and {one.request_id for one in found} == {"one"}
    assert served.fleet.describe().num_split == before + 1
    branches = {**SPLIT, "num_outputs_per_prompt": 5, "fork": {1: 2}, "rollout_sde_type": "sde"}
    for one, other in zip(client.rollout(**branches), local.rollout(**branches), strict=True):
        assert_same_bits(one, other)
        assert one.sampling.branches == other.sampling.branches
    drawn = client.rollout(**ASKED, num_outputs_per_prompt=6)
    assert [one.seed for one in drawn] == list(range(drawn[0].seed, drawn[0].seed + 6))


def test_scores_and_images_come_from_any_replica(client: Client, local: Engine):
    rollouts = local.rollout(**SPLIT)
    assert torch.equal(client.score(rollouts).log_probs, torch.stack([one.log_probs for one in rollouts]))
    image = client.generate("a blue square", seed=1, num_inference_steps=2)[0].image
    assert torch.equal(image, local.generate("a blue square", seed=1, num_inference_steps=2)[0].image)


def test_answers_about_the_server_are_those_of_one(served: Any, client: Client):
    assert client.health()["status"] == "ok"
    info = client.server_info()
    assert info["family"] == "z_image" and info["is_ready"]
    assert info["queue"]["accepted"] == info["queue"]["completed"] + info["queue"]["failed"]
    with pytest.raises(InvalidRequestError, match="num_inference_steps"):
        client.rollout("a red circle", num_inference_steps=0)
    for path in ("/health_generate", "/readiness", "/v1/models", "/openapi.json"):
        assert httpx.get(f"{served.url}{path}").status_code == 200
    assert httpx.post(f"{served.url}/rollout/generate", json={"prompt": "a", "colour": 1}).json()["error"]["code"] == (
        "invalid_request"
    )


def test_replicas_and_metrics_show_each_of_them(served: Any, client: Client):
    info = httpx.get(f"{served.url}/replicas").json()
    assert [one["state"] for one in info["replicas"]] == ["ready", "ready"]
    text = client.metrics()
    for one in info["replicas"]:
        assert f'flowroll_replica_version_number{{replica="{one["id"]}",state="ready"}}' in text
    assert "flowroll_split_requests_total" in text and "flowroll_accepted_requests_total" in text


def test_one_push_changes_all_replicas_or_none(served: Any, client: Client, local: Engine):
    before = client.server_info()["weight_version"]
    weights = {name: tensor * 1.01 for name, tensor in load_file(MODEL / "transformer" / WEIGHTS).items()}
    updated = client.update_weights(weights, bucket_bytes=2**20)
    version = updated.weight_version
    assert updated.previous_version == before and int(version) == int(before) + 1
    local.update_weights_from_tensors(weights)
    # Of all replicas: they are compared before one of them is told.
    assert client.weights_checksum() == local.weights_checksum()
    assert {one.weight_version for one in served.fleet.describe().replicas} == {version}
    assert_same(client.rollout(**SPLIT, min_weight_version=version), local.rollout(**SPLIT))
    with pytest.raises(OutdatedWeightsError):
        client.rollout(**SPLIT, min_weight_version=str(int(version) + 1))
    broken = {**weights, next(iter(weights)): torch.full_like(next(iter(weights.values())), torch.nan)}
    for refused in (broken, {"other": torch.ones(1)}, {name: tensor for name, tensor in list(weights.items())[1:]}):
        with pytest.raises(WeightsRejectedError):
            client.update_weights(refused)
    assert client.server_info()["weight_version"] == version
    assert client.weights_checksum() == local.weights_checksum()
    # The next push finds no update under way.
    client.update_weights({name: tensor / 1.01 for name, tensor in weights.items()})


def test_weights_on_disk_change_all_replicas_or_none(served: Any, client: Client, local: Engine):
    folder = with_other(MODEL, served.root / "other", factor=0.99)
    version = client.update_weights_from_disk(folder, weight_version="named").weight_version
    local.update_weights_from_disk(folder)
    assert version == "named" and client.weights_checksum() == local.weights_checksum()
    (folder / "transformer" / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(WeightsRejectedError):
        client.update_weights_from_disk(folder)
    assert client.server_info()["weight_version"] == "named"
    client.update_weights_from_disk(MODEL)
    local.update_weights_from_disk(MODEL)
    assert client.weights_checksum() == local.weights_checksum()


def test_sleep_pause_and_abort_are_of_the_whole_fleet(client: Client, served: Any):
    client.release_memory("disk")
    for _ in range(4):
        with pytest.raises(AsleepError):
            client.rollout(**ASKED)
    client.resume_memory()
    httpx.post(f"{served.url}/pause_generation")
    for _ in range(4):
        with pytest.raises(PausedError):
            client.rollout(**ASKED)
    httpx.post(f"{served.url}/continue_generation")
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client.rollout, **LONG, request_id=str(number)) for number in range(4)]
        until(lambda: client.server_info()["queue"]["running"] == 4)
        assert httpx.post(f"{served.url}/abort_request", json={"abort_all": True}).json()["num_aborted"] == 4
        for one in running:
            with pytest.raises(CancelledRequestError):
                one.result(WAIT_S)


def test_a_client_that_leaves_takes_its_request_along(served: Any, client: Client):
    with httpx.Client(timeout=0.5) as other, pytest.raises(httpx.ReadTimeout):
        other.post(f"{served.url}/rollout/generate", json=LONG)
    until(lambda: client.server_info()["queue"]["running"] == 0)
    until(lambda: all(one.image_steps == 0 for one in served.fleet.describe().replicas))


def test_a_split_request_is_aborted_once(served: Any, client: Client):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.rollout, **{**LONG, "num_outputs_per_prompt": 7}, request_id="split")
        until(lambda: [one.num_requests for one in served.fleet.describe().replicas] == [1, 1])
        assert client.abort_request("split") == 1
        with pytest.raises(CancelledRequestError):
            running.result(WAIT_S)
    until(lambda: all(one.image_steps == 0 for one in served.fleet.describe().replicas))


@pytest.mark.slow
def test_finished_samples_of_a_split_group_are_kept(served: Any, client: Client, local: Engine):
    """The request is aborted after 300 of its 480 steps; a replica runs eight of its twelve samples at a time."""

    def steps() -> float:
        return Scrape.read(client.metrics(), 0).total("flowroll_steps_total")

    asked = {**ASKED, "num_inference_steps": 20, "num_outputs_per_prompt": 24, "request_id": "part"}
    before = steps()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.rollout, **asked, seed=7)
        until(lambda: steps() >= before + 300)
        assert client.abort_request("part", keep_partial=True) == 1
        found = running.result(WAIT_S)
    left_out = found[0].left_out
    assert 0 < len(found) < 24 and {one.left_out for one in found} == {left_out}
    kept = [7 + place for place in range(24) if place not in left_out]
    assert [one.seed for one in found] == kept
    assert_same(found[:3], local.rollout(**{**asked, "num_outputs_per_prompt": None, "seeds": kept[:3]}))
    # The next one is whole.
    assert client.rollout(**SPLIT)[0].left_out == ()


def test_no_sample_is_older_than_its_request_allows(served: Any, client: Client):
    asked = {**ASKED, "num_inference_steps": 60, "num_outputs_per_prompt": 2, "max_staleness": 0}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client.rollout, **asked, seed=seed) for seed in range(2)]
        until(lambda: client.server_info()["queue"]["running"] == 2)
        number = served.fleet.describe().version_number
        version = client.update_weights_from_disk(MODEL).weight_version
        for one in running:
            try:
                stamps = [(sample.first_step, sample.last_step) for sample in one.result(WAIT_S)]
            except OutdatedWeightsError as error:
                assert error.field == "max_staleness"
            else:
                # It was run elsewhere, with the new weights.
                assert {stamp.weight_version for pair in stamps for stamp in pair} == {version}
    info = served.fleet.describe()
    assert info.version_number == client.server_info()["version_number"] == number + 1
    (rollout,) = client.rollout(**ASKED, seed=1, max_staleness=0)
    assert rollout.last_step is not None and rollout.last_step.version_number == info.version_number
    assert f'flowroll_version_samples_total{{version="{version}"}}' in client.metrics()
    assert f"flowroll_version_number {info.version_number}" in client.metrics()


@pytest.mark.slow
def test_all_replicas_take_weights_from_a_process_group(served: Any, client: Client, local: Engine):
    weights = {name: tensor * 1.03 for name, tensor in load_file(MODEL / "transformer" / WEIGHTS).items()}
    before = served.fleet.describe().version_number
    with WeightGroup([client]) as group:
        (version,) = group.update_weights(weights, bucket_bytes=2**20)
        assert served.fleet.describe().version_number == before + 1
        local.update_weights_from_tensors(weights)
        assert client.weights_checksum() == local.weights_checksum()
        assert_same(client.rollout(**SPLIT, min_weight_version=version), local.rollout(**SPLIT))
        with pytest.raises(WeightsRejectedError):
            group.update_weights({"other": torch.ones(1)})
        assert client.weights_checksum() == local.weights_checksum()
    client.update_weights_from_disk(MODEL)
    local.update_weights_from_disk(MODEL)


@pytest.mark.slow
def test_vllms_verbs_change_all_replicas_or_none(served: Any, client: Client, local: Engine):
    weights = {name: tensor * 1.04 for name, tensor in load_file(MODEL / "transformer" / WEIGHTS).items()}
    with httpx.Client(base_url=served.url, timeout=WAIT_S) as http, joined(http) as group:
        sync = SyncClient(http)
        sync.start_weight_update()
        for bucket in halves(weights):
            send(http, group, bucket, packed=False)
        assert client.weights_checksum() == local.weights_checksum()
        sync.finish_weight_update()
        local.update_weights_from_tensors(weights)
        assert client.weights_checksum() == local.weights_checksum()
        described = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}
        refused = http.post("/update_weights", json={"update_info": described})
        assert refused.status_code == ForbiddenError.status and "/start_weight_update" in refused.json()["error"]["message"]
        # The weights were whole, so one that joins needs nothing from before.
        lost = served.fleet.describe()
        os.kill(lost.replicas[0].pid, signal.SIGKILL)
        until(lambda: all_ready(served) and served.fleet.describe().num_lost == lost.num_lost + 1)
        assert client.weights_checksum() == local.weights_checksum()
    client.update_weights_from_disk(MODEL)
    local.update_weights_from_disk(MODEL)


def test_top_shows_the_replicas(served: Any, capsys: pytest.CaptureFixture[str]):
    top(url=served.url, interval_s=0.1, once=True)
    shown = capsys.readouterr().out
    for one in served.fleet.describe().replicas:
        assert one.id in shown
    assert "ready" in shown and "steps" in shown


def test_what_is_one_machines_is_refused(served: Any, ray: Any):
    group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "group_name": "g"}
    answer = httpx.post(f"{served.url}/init_weights_update_group", json={**group, "backend": "gloo"}, timeout=WAIT_S)
    assert answer.status_code == InvalidRequestError.status and "2 replicas" in answer.json()["error"]["message"]
    with pytest.raises(InvalidRequestError, match="allow_pickle_weights"):
        cluster.serve(MODEL, port=0, allow_pickle_weights=True)
    with pytest.raises(InvalidRequestError, match="replicas"):
        cluster.serve(MODEL, replicas=0)
    with pytest.raises(InvalidRequestError, match="gpus_per_replica"):
        cluster.serve(MODEL, port=0, gpus_per_replica=100)


@pytest.mark.slow
def test_a_killed_replica_costs_no_request_and_comes_back_with_all_that_was_changed(served: Any, client: Client, local: Engine):
    weights = {name: tensor * 1.02 for name, tensor in load_file(MODEL / "transformer" / WEIGHTS).items()}
    client.update_weights(weights, weight_version="before")
    local.update_weights_from_tensors(weights)
    client.copy_policy("old")
    trained = policy(ZImageTransformer2DModel.from_pretrained(MODEL / "transformer"))
    tensors, config = peft.get_peft_model_state_dict(trained), trained.peft_config["default"].to_dict()
    for one in (client, local):
        one.load_lora_adapter_from_tensors(tensors, config, name="one", weight_version="with")
    lost, asked = served.fleet.describe(), requests(10)
    victim = lost.replicas[0]
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(client.rollout, **{**one, "num_inference_steps": 12}) for one in asked]
        until(lambda: any(one.id == victim.id and one.num_requests > 1 for one in served.fleet.describe().replicas))
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        for one, ended in zip(asked, running, strict=True):
            assert_same(ended.result(WAIT_S), local.rollout(**{**one, "num_inference_steps": 12}))
    until(lambda: all_ready(served))
    info = served.fleet.describe()
    assert info.num_lost == lost.num_lost + 1 and info.num_retried > lost.num_retried
    assert victim.id not in [one.id for one in info.replicas]
    assert len({one.version_number for one in info.replicas}) == 1
    # Compared over all replicas, the new one among them.
    assert client.weights_checksum() == local.weights_checksum()
    for _ in range(4):
        assert_same(client.rollout(**SPLIT, min_weight_version="before"), local.rollout(**SPLIT))
        assert_same(client.rollout(**SPLIT, lora_name="one"), local.rollout(**SPLIT, lora_name="one"))
        assert client.rollout(**SPLIT, policy="old")[0].sampling.policy.name == "old"
    client.drop_policy("old")
    client.unload_lora_adapter("one")
    local.unload_lora_adapter("one")


@pytest.mark.slow
def test_replicas_come_and_go_under_traffic(served: Any, client: Client, local: Engine):
    expected, ended, before = local.rollout(**SPLIT), threading.Event(), served.fleet.describe()

    def ask() -> int:
        count = 0
        while not ended.is_set():
            assert_same(client.rollout(**SPLIT), expected)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        counts = [pool.submit(ask) for _ in range(2)]
        served.fleet.resize(1)
        assert all_ready(served, 1)
        served.fleet.resize(2)
        assert all_ready(served, 2)
        ended.set()
        assert sum(one.result(WAIT_S) for one in counts) > 0
    info = served.fleet.describe()
    # The one that left has finished what it was given.
    assert (info.num_lost, info.num_retried) == (before.num_lost, before.num_retried)
    assert client.weights_checksum() == local.weights_checksum()


@pytest.mark.slow
def test_a_replica_that_leaves_finishes_what_it_runs_though_the_fleet_is_paused_meanwhile(
    served: Any, client: Client, local: Engine
):
    long = {**SPLIT, "num_inference_steps": 60}
    expected, before = local.rollout(**long), served.fleet.describe()
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(client.rollout, **long)
        until(lambda: all(one.num_requests for one in served.fleet.describe().replicas))
        httpx.post(f"{served.url}/pause", params={"mode": "keep"}).raise_for_status()
        resized = pool.submit(served.fleet.resize, 1)
        until(lambda: "draining" in {one.state for one in served.fleet.describe().replicas})
        assert not asked.done() and not resized.done()
        httpx.post(f"{served.url}/resume").raise_for_status()
        assert_same(asked.result(WAIT_S), expected)
        resized.result(WAIT_S)
    info = served.fleet.describe()
    assert (info.num_lost, info.num_retried) == (before.num_lost, before.num_retried)
    served.fleet.resize(2)
    assert all_ready(served, 2)


@pytest.mark.slow
def test_a_replica_that_joins_is_as_the_others_are(served: Any, client: Client, local: Engine):
    """It is asleep or paused if they are, and has what has come of an update that goes on."""

    def replace_one() -> None:
        lost = served.fleet.describe()
        os.kill(lost.replicas[0].pid, signal.SIGKILL)
        until(lambda: all_ready(served) and served.fleet.describe().num_lost == lost.num_lost + 1)

    client.release_memory("disk")
    replace_one()
    for _ in range(4):
        with pytest.raises(AsleepError):
            client.rollout(**ASKED)
    client.resume_memory()
    httpx.post(f"{served.url}/pause_generation")
    replace_one()
    for _ in range(4):
        with pytest.raises(PausedError):
            client.rollout(**ASKED)
    httpx.post(f"{served.url}/continue_generation")
    weights = {name: tensor * 1.05 for name, tensor in load_file(MODEL / "transformer" / WEIGHTS).items()}

    def half_sent() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(weights.items()):
            if number == len(weights) // 2:
                replace_one()
            yield name, tensor

    client.update_weights(half_sent(), bucket_bytes=2**18)
    local.update_weights_from_tensors(weights)
    # Of both, or it is an error.
    assert client.weights_checksum() == local.weights_checksum()
    client.update_weights_from_disk(MODEL)
    local.update_weights_from_disk(MODEL)


@pytest.mark.slow
def test_a_replica_that_reads_other_weights_than_the_others_takes_no_request(served: Any, client: Client, local: Engine):
    folder = with_other(MODEL, served.root / "changed", factor=0.98)
    client.update_weights_from_disk(folder)
    local.update_weights_from_disk(folder)
    kept = (folder / "transformer" / WEIGHTS).read_bytes()
    change(folder / "transformer", lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    lost = served.fleet.describe()
    os.kill(lost.replicas[0].pid, signal.SIGKILL)
    # The second attempt has begun: the first one was refused.
    until(lambda: newest_of(served.fleet.describe()) >= 2 + newest_of(lost))
    assert [one.state for one in served.fleet.describe().replicas].count("ready") == 1
    assert_same(client.rollout(**SPLIT), local.rollout(**SPLIT))
    (folder / "transformer" / WEIGHTS).write_bytes(kept)
    until(lambda: all_ready(served))
    assert client.weights_checksum() == local.weights_checksum()
    client.update_weights_from_disk(MODEL)
    local.update_weights_from_disk(MODEL)


def newest_of(info: Any) -> int:
    return max(int(one.id.split("-")[1]) for one in info.replicas)


@pytest.mark.slow
def test_a_replica_that_says_nothing_is_replaced(ray: Any):
    with cluster.serve(
        MODEL, replicas=1, threads=1, device="cpu", port=0, rank_timeout_s=3.0, batching=BatchLimits(max_batch_samples=4)
    ) as served:
        (silent,) = served.fleet.describe().replicas
        os.kill(silent.pid, signal.SIGSTOP)
        until(lambda: all_ready(served, 1) and served.fleet.describe().num_lost == 1)
        with Client(served.url, timeout_s=WAIT_S) as client:
            assert len(client.rollout(**ASKED)) == 1


def test_a_folder_that_is_no_checkpoint_is_refused(ray: Any, tmp_path: Path):
    from flowroll.errors import CheckpointError

    with pytest.raises(CheckpointError):
        cluster.serve(tmp_path / "nothing", port=0)
