"""Clients that poll: reads of the weights take turns with steps, are kept, and are bounded; so are the changes that wait."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.serving.servers import SMALL, WAIT_S, Background, error_of, serving, until

from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.engine.weights.digests import WeightDigests
from flowroll.errors import QueueFullError

CHECKSUM = "/get_weights_checksum"


@pytest.fixture(scope="module")
def service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=8) as service:
        yield service


@pytest.fixture(scope="module")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, max_control_queue=2) as client:
        yield client


@contextlib.contextmanager
def polling(url: str, path: str, count: int) -> Iterator[list[int]]:
    """So many clients that ask again as soon as they are answered; yields the statuses."""
    ends, statuses = threading.Event(), []

    def poll() -> None:
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            while not ends.is_set():
                statuses.append(client.post(path, json={}).status_code)

    threads = [threading.Thread(target=poll) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ends.set()
        for thread in threads:
            thread.join(WAIT_S)


@pytest.mark.parametrize("is_kept", [True, False])
def test_four_pollers_stop_no_rollout(
    is_kept: bool, server: httpx.Client, service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_kept:  # as with weights that change all the time
        keep = WeightDigests._keep

        def forget_first(self: WeightDigests, module: str, *arguments: object) -> object:
            self.forget(module)
            return keep(self, module, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(WeightDigests, "_keep", forget_first)
    with polling(str(server.base_url), CHECKSUM, 4) as statuses:
        until(lambda: len(statuses) > 8)
        for _ in range(3):
            assert server.post("/rollout/generate", json=SMALL).status_code == 200
        assert set(statuses) == {200}


def test_a_checksum_is_computed_once_for_the_same_weights(service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, computed = service.engine, []
    hash_module = WeightDigests._hash_module

    def noted(self: WeightDigests, module: object) -> object:
        computed.append(module)
        return hash_module(self, module)  # type: ignore[arg-type]

    weights = {name: tensor.clone() for name, tensor in engine._model.transformer.state_dict().items()}
    monkeypatch.setattr(WeightDigests, "_hash_module", noted)
    engine.update_weights_from_tensors(weights, weight_version="same")
    first = {engine.weights_checksum() for _ in range(3)}
    assert len(first) == len(computed) == 1
    # Under the version that they had: what counts is that they have changed.
    name = sorted(weights)[0]
    engine.update_weights_from_tensors({**weights, name: weights[name] + 1}, weight_version="same")
    assert engine.weights_checksum() not in first and len(computed) == 2
    engine.update_weights_from_tensors(weights)
    assert {engine.weights_checksum()} == first


def test_reads_beyond_the_bound_are_refused_and_the_others_answered(service: EngineService) -> None:
    held, begun = threading.Event(), threading.Event()
    other = EngineService(service.engine, max_queue=8, max_control_queue=2)
    blocker = threading.Thread(target=lambda: service.engine.exclusive(lambda: (begun.set(), held.wait(WAIT_S))))
    blocker.start()
    assert begun.wait(WAIT_S)
    reads = [other.checksums(["vae"]), other.verify_weights([], "vae")]
    with pytest.raises(QueueFullError, match="checks of the weights must be at most 2 at a time, got one more"):
        other.differing_weights({}, "vae")
    held.set()
    blocker.join(WAIT_S)
    assert list(reads[0].result(WAIT_S)) == ["vae"] and reads[1].exception(WAIT_S) is not None
    assert other.differing_weights({"no.such": ""}, "vae").result(WAIT_S) == (["no.such"], [])


def test_changes_beyond_the_bound_are_refused(server: httpx.Client, service: EngineService) -> None:
    held, begun = threading.Event(), threading.Event()
    blocker = threading.Thread(target=lambda: service.engine.exclusive(lambda: (begun.set(), held.wait(WAIT_S))))
    blocker.start()
    assert begun.wait(WAIT_S)
    url = f"{server.base_url}/release_memory_occupation"
    sleeps = [Background(lambda: httpx.post(url, timeout=WAIT_S)) for _ in range(6)]
    try:
        refused: list[httpx.Response] = []

        def is_full() -> bool:
            refused[:] = [one._answer for one in sleeps if one._answer is not None and one._answer.status_code == 429]
            return len(refused) >= 4

        until(is_full)
        assert error_of(refused[0])["code"] == "queue_full" and "retry-after" in refused[0].headers
    finally:
        held.set()
        blocker.join(WAIT_S)
    assert sum(one.answer().status_code == 429 for one in sleeps) >= 4
    assert server.post("/resume_memory_occupation").status_code == 200
