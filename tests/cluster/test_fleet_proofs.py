"""Long proofs about a fleet: many mixed requests with kills, and many updates under traffic with kills."""

import contextlib
import csv
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cluster.test_fleet import ASKED, MODEL, SPLIT, all_ready, assert_same, check_mixed, requests, until
from tests.weights import WEIGHTS

from flowroll import Client, Engine, Rollout, cluster
from flowroll.engine import BatchLimits
from flowroll.examples import flow_grpo
from flowroll.examples.rl import loop
from flowroll.examples.server import Server
from flowroll.types import Layout

WAIT_S = 300.0


def _served(**options: Any) -> Any:
    return cluster.serve(
        MODEL,
        **{"replicas": 2, "threads": 1, "device": "cpu", "port": 0, "batching": BatchLimits(max_batch_samples=4), **options},
    )


def _kill(served: Any, drawn: random.Random) -> None:
    ready = [one for one in served.fleet.describe().replicas if one.state == "ready" and one.pid is not None]
    os.kill(drawn.choice(ready).pid, signal.SIGKILL)


@pytest.mark.proof
def test_two_hundred_mixed_requests_with_kills_have_the_bits_of_a_single_engine(ray: Any):
    asked, drawn = requests(200), random.Random(0)
    with Engine(MODEL, device="cpu") as local, _served() as served:
        with Client(served.url, timeout_s=WAIT_S) as client, ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(client.rollout, **one) for one in asked]
            for count in (40, 90, 140):
                until(lambda count=count: sum(one.done() for one in answers) >= count)
                until(lambda: all_ready(served))
                _kill(served, drawn)
            found = [one.result(WAIT_S) for one in answers]
        info = served.fleet.describe()
        assert info.num_lost == 3 and info.num_retried > 0 and info.num_split > 20
        for one, answer in zip(asked, found, strict=True):
            assert_same(answer, local.rollout(**one))


@pytest.mark.proof
@pytest.mark.parametrize("order", ["rolling", "barrier"])
def test_fifty_updates_under_traffic_with_kills_mix_nothing_and_lose_nothing(ray: Any, order: str):
    """Every answer is that of an engine with the weights of its version; versions never run backwards."""
    base = load_file(MODEL / "transformer" / WEIGHTS)
    factor = {str(number): 1 + 0.001 * number for number in range(51)}
    drawn, ended, num_updates = random.Random(1), threading.Event(), 50
    small = {**ASKED, "num_outputs_per_prompt": 2, "seed": 5}

    def weights(version: str) -> dict[str, torch.Tensor]:
        return {name: tensor * factor[version] for name, tensor in base.items()}

    def ask(url: str, values: dict[str, Any]) -> list[list[Rollout]]:
        """Requests one after the other, each of which demands the version of the answer before it."""
        answers: list[list[Rollout]] = []
        newest = "0"
        with Client(url, timeout_s=WAIT_S) as client:
            while not ended.is_set():
                answer = client.rollout(**values, min_weight_version=newest)
                assert int(answer[0].weight_version) >= int(newest)
                newest = answer[0].weight_version
                answers.append(answer)
        return answers

    with _served(update_order=order) as served, Client(served.url, timeout_s=WAIT_S) as trainer:
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, served.url, values) for values in (small, SPLIT, small, SPLIT)]
            try:
                for number in range(1, num_updates + 1):
                    if number % 10 == 0:
                        until(lambda: all_ready(served))
                        # At a moment of the update that is drawn.
                        threading.Timer(drawn.random() * 0.3, _kill, (served, drawn)).start()
                    assert trainer.update_weights(weights(str(number)), bucket_bytes=2**19).weight_version == str(number)
            finally:
                ended.set()
            found = [one.result(WAIT_S) for one in asking]
        until(lambda: all_ready(served))
        info = served.fleet.describe()
        assert info.num_lost == 5 and info.version_number == num_updates
        assert {one.weight_version for one in info.replicas} == {str(num_updates)}
        # Of both replicas, or it is an error.
        checksum = trainer.weights_checksum()
    answers = [(values, answer) for values, list_ in zip((small, SPLIT, small, SPLIT), found, strict=True) for answer in list_]
    by_version = sorted(answers, key=lambda pair: int(pair[1][0].weight_version))
    assert len({pair[1][0].weight_version for pair in by_version}) > 20
    with Engine(MODEL, device="cpu") as local:
        for version, group in itertools.groupby(by_version, key=lambda pair: pair[1][0].weight_version):
            if version != "0":
                local.update_weights_from_tensors(weights(version))
            expected = {id(values): local.rollout(**values) for values in (small, SPLIT)}
            for values, answer in group:
                assert {one.weight_version for one in answer} == {version}
                assert_same(answer, expected[id(values)])
        local.update_weights_from_tensors(weights(str(num_updates)))
        assert checksum == local.weights_checksum()


@pytest.mark.proof
def test_replicas_of_two_ranks_have_the_bits_of_one(ray: Any):
    with Engine(MODEL, device="cpu") as local, _served(layout=Layout(sp=2)) as served:
        check_mixed(served, local, 10)
        # A rank that ends takes its replica along, and no request.
        before = time.monotonic()
        with Client(served.url, timeout_s=WAIT_S) as client, ThreadPoolExecutor(4) as pool:
            running = [pool.submit(client.rollout, **{**SPLIT, "num_inference_steps": 20}) for _ in range(4)]
            until(lambda: any(one.num_requests for one in served.fleet.describe().replicas))
            _kill(served, random.Random(0))
            expected = local.rollout(**{**SPLIT, "num_inference_steps": 20})
            for one in running:
                assert_same(one.result(WAIT_S), expected)
        assert time.monotonic() - before < WAIT_S
        until(lambda: all_ready(served))


@pytest.mark.proof
def test_a_run_of_grpo_against_a_fleet_is_that_against_a_server(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same rewards to the last digit, over rounds that each push new weights."""
    flags = ["--rounds", "3", "--prompts", "2", "--group-size", "6", "--evaluate-every", "3", "--family", "z_image"]
    flow_grpo.main([*flags, "--out", str(tmp_path / "server")])

    @contextlib.contextmanager
    def fleet(*_: Any) -> Iterator[Server]:
        with _served() as served:
            yield Server(url=served.url, pid=os.getpid(), startup_s=0.0)
            assert served.fleet.describe().num_split > 0

    monkeypatch.setattr(loop, "running_server", fleet)
    flow_grpo.main([*flags, "--out", str(tmp_path / "fleet")])
    rows = [_rewards(tmp_path / name / "rewards.csv") for name in ("server", "fleet")]
    assert rows[0] == rows[1] and len(rows[0]) > 1


def _rewards(file: Path) -> list[tuple[str, ...]]:
    """The rows of a run without its times."""
    with file.open() as lines:
        return [
            tuple(value for name, value in row.items() if "second" not in name and "_s" not in name)
            for row in csv.DictReader(lines)
        ]
