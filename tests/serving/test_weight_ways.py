"""Every family: weights from shared memory and from a process group have the bits of a fresh start, and so has waking up."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.guiding import in_words_of, pictured
from tests.pickling import pushed, trainer
from tests.rollouts import assert_same_bits
from tests.serving.servers import serving
from tests.serving.test_shared_tensor_route import ROUTE
from tests.weights import REQUEST, WEIGHTS, with_other

from flowroll.client import Client
from flowroll.client.weight_group import WeightGroup
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_by_every_way_and_stay_over_a_sleep(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    request = pictured(family, in_words_of(family, {**REQUEST, "guidance_scale": 4.0}))
    folders = {"0": checkpoints[family], "1": with_other(checkpoints[family], tmp_path / "other")}
    tensors = {version: load_file(folder / "transformer" / WEIGHTS) for version, folder in folders.items()}
    with Engine(folders["1"], device="cpu") as engine:
        (new,), new_sum = engine.rollout(**request), engine.weights_checksum()
    with (
        Engine(folders["0"], device="cpu") as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service, allow_pickle_weights=True, rank_timeout_s=20.0) as server,
        Client(str(server.base_url)) as client,
    ):
        (old,), old_sum = engine.rollout(**request), engine.weights_checksum()
        size = sum(tensor.nbytes for tensor in tensors["1"].values()) // 2
        with trainer():
            answers = [server.post(ROUTE, json=body) for body, _ in pushed(tensors["1"], version="5", bucket_bytes=size)]
        assert len(answers) > 1 and answers[-1].json()["is_complete"], answers[-1].text
        assert_same_bits(client.rollout(**request)[0], new)
        assert (engine.weight_version, engine.weights_checksum()) == ("5", new_sum) != ("5", old_sum)
        with WeightGroup([client], timeout_s=20.0) as group:
            assert group.update_weights(tensors["0"], weight_version="6", bucket_bytes=size) == ["6"]
        assert_same_bits(client.rollout(**request)[0], old)
        assert engine.weights_checksum() == old_sum
        assert engine.sleep("disk").num_bytes > 0
        engine.wake()
        assert_same_bits(client.rollout(**request)[0], old)
        assert (engine.weight_version, engine.weights_checksum()) == ("6", old_sum)
