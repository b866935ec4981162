"""A hundred updates of weights while rollouts never stop: every trajectory is of one version, and none is lost."""

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.rollouts import assert_same_bits
from tests.serving.servers import serving
from tests.weights import REQUEST, WEIGHTS, with_other

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService

UPDATES = 100
# More steps than an update takes, so that updates fall into trajectories.
ASKED = [{**REQUEST, "seed": seed, "num_inference_steps": steps} for seed, steps in ((1, 3), (2, 8), (3, 16))]


@pytest.mark.slow
def test_a_hundred_updates_under_traffic_mix_no_trajectory_and_lose_no_request(
    z_image_checkpoint: Path, tmp_path: Path
) -> None:
    folders = [z_image_checkpoint, with_other(z_image_checkpoint, tmp_path / "other")]
    expected = [_alone(folder) for folder in folders]
    with (
        Engine(z_image_checkpoint, device="cpu") as engine,
        EngineService(engine, max_queue=8) as service,
        serving(service, weights_roots=tuple(map(str, folders))) as http,
        Client(str(http.base_url)) as trainer,
    ):
        num_answers, _ = _update_under_traffic(trainer, folders, expected, range(1, 11))
        before = _held()
        more_answers, versions = _update_under_traffic(trainer, folders, expected, range(11, 11 + UPDATES))
        # Traffic was there all along.
        assert len(versions) > UPDATES / 4
        stats = service.status().counts
        assert (stats.accepted, stats.completed, stats.failed) == (num_answers + more_answers,) * 2 + (0,)
        (held_bytes, held_files), (bytes_before, files_before) = _held(), before
        assert held_bytes == bytes_before and held_files <= files_before


def _update_under_traffic(
    trainer: Client, folders: list[Path], expected: list[list[Rollout]], versions: range
) -> tuple[int, set[str]]:
    """Updates to these versions, odd ones of the second folder; the number of answers meanwhile, and their versions."""
    answers: list[tuple[int, Rollout]] = []
    ended = threading.Event()
    clients = [threading.Thread(target=_ask, args=(trainer, index, ended, answers)) for index in range(len(ASKED))]
    for client in clients:
        client.start()
    try:
        for number in versions:
            folder, mode = folders[number % 2], ("drain", "abort")[number // 2 % 2]
            if number % 10 == 0:
                tensors = load_file(folder / "transformer" / WEIGHTS)
                trainer.update_weights(tensors, weight_version=str(number), mode=mode)
            else:
                trainer.update_weights_from_disk(folder, weight_version=str(number), mode=mode)
    finally:
        ended.set()
        for client in clients:
            client.join()
    for index, rollout in answers:
        assert_same_bits(rollout, expected[int(rollout.weight_version) % 2][index])
    return len(answers), {rollout.weight_version for _, rollout in answers}


def _alone(folder: Path) -> list[Rollout]:
    with Engine(folder, device="cpu") as engine:
        return [engine.rollout(**request)[0] for request in ASKED]


def _ask(client: Client, index: int, ended: threading.Event, answers: list[tuple[int, Rollout]]) -> None:
    while not ended.is_set():
        (rollout,) = client.rollout(**ASKED[index])
        answers.append((index, rollout))


def _held() -> tuple[int, int]:
    """Bytes of tensors and open files of this process, once nobody works."""
    gc.collect()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values()), len(os.listdir("/proc/self/fd"))
