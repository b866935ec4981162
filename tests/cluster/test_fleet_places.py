"""Long proofs about where replicas are and what outlives them: nodes that have what one needs, nodes that go, versions."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.cluster.test_fleet import ASKED, MODEL, all_ready, until
from tests.cluster.test_fleet_proofs import WAIT_S, _kill, _served
from tests.weights import WEIGHTS

from flowroll import Client, Engine
from flowroll.client.weight_group import WeightGroup
from flowroll.errors import OutdatedWeightsError, WeightsRejectedError

# Several raylets on this machine, whose GPUs are numbers alone. A process of its own: a driver is of one cluster.
NODES = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from flowroll import Engine, SamplingParams
from flowroll.checkpoints import shapes_checkpoint
from flowroll.cluster.fleet import Fleet
from flowroll.cluster.replica import Placement
from flowroll.cluster.replicas import ReplicaSet
from flowroll.engine.plan import plan_request
from flowroll.engine.service import EngineService
from flowroll.types import Layout
from tests.rollouts import assert_same_bits


def main():
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    small = [nodes.add_node(num_cpus=2, num_gpus=1) for _ in range(2)]
    large = nodes.add_node(num_cpus=2, num_gpus=2)
    ray.init(address=nodes.address, log_to_driver=False)
    placement = Placement(num_cpus=1, num_gpus=2)
    # There are four GPUs, and two of them are apart.
    assert ray.cluster_resources()["GPU"] == 4 and placement.num_places() == 1
    model = shapes_checkpoint("z_image")
    engine = {"model": str(model), "device": "cpu", "num_threads": 1, "layout": Layout(sp=2)}
    params = SamplingParams(prompt="a red circle", seed=1, num_outputs_per_prompt=3, num_inference_steps=40)
    with Fleet(ReplicaSet(engine, num_replicas=1, placement=placement)) as fleet:
        (first,) = fleet.describe().replicas
        assert first.node == large.node_id, (first, large.node_id)
        plan = plan_request(params, fleet.facts.model, fleet.facts.info.limits)
        answer = fleet.call(EngineService.submit, plan, "rollout")
        while not fleet.describe().replicas[0].num_requests:
            time.sleep(0.01)
        nodes.remove_node(large)
        # Nothing is left that holds two GPUs, so the request waits for a node.
        time.sleep(3)
        assert not answer.done()
        other = nodes.add_node(num_cpus=2, num_gpus=2)
        found = answer.result(240)
        (second,) = [one for one in fleet.describe().replicas if one.state == "ready"]
        assert second.node == other.node_id and second.id != first.id
        info = fleet.describe()
        assert info.num_lost == 1 and info.num_retried == 1
        held = [one for one in placement_group_table().values() if one["state"] == "CREATED"]
        assert [(one["strategy"], one["bundles"]) for one in held] == [("STRICT_PACK", {0: {"CPU": 1.0, "GPU": 2.0}})]
    assert all(one["state"] == "REMOVED" for one in placement_group_table().values())
    with Engine(model, device="cpu") as local:
        for one, expected in zip(found, local.rollout(params), strict=True):
            assert_same_bits(one, expected)
    ray.shutdown()
    nodes.shutdown()
    print("done")


main()
"""


@pytest.mark.proof
def test_a_replica_goes_to_a_node_that_has_what_its_ranks_need_and_to_another_when_that_goes():
    pytest.importorskip("ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", NODES], capture_output=True, text=True, timeout=WAIT_S, env=environment)
    assert ended.returncode == 0 and ended.stdout.endswith("done\n"), ended.stderr[-4000:]


@pytest.mark.proof
def test_versions_go_on_when_the_whole_fleet_is_started_again(ray: Any, tmp_path: Path):
    options: dict[str, Any] = {"replicas": 1, "state_dir": str(tmp_path / "state"), "weights_roots": (str(MODEL),)}
    with _served(**options) as served, Client(served.url, timeout_s=WAIT_S) as client:
        client.update_weights_from_disk(MODEL, weight_version="named")
        assert client.update_weights_from_disk(MODEL).weight_version == "1"
        assert served.fleet.describe().version_number == 2
    with _served(**options) as served, Client(served.url, timeout_s=WAIT_S) as client:
        info = client.server_info()
        # The checkpoint's own weights, which are older than all that came.
        assert (info["weight_version"], info["version_number"]) == ("0", 0)
        client.rollout(**ASKED)
        for demanded in ({"min_weight_version": "named"}, {"min_weight_version": "1"}, {"max_staleness": 1}):
            with pytest.raises(OutdatedWeightsError):
                client.rollout(**ASKED, **demanded)
        assert client.update_weights_from_disk(MODEL).weight_version == "2"
        before = served.fleet.describe()
        assert before.version_number == 3
        os.kill(before.replicas[0].pid, 9)
        until(lambda: all_ready(served, 1) and served.fleet.describe().num_lost == 1)
        (rollout,) = client.rollout(**ASKED, min_weight_version="named", max_staleness=0)
        assert rollout.first_step is not None and rollout.first_step.version_number == 3


@pytest.mark.proof
def test_a_replica_that_replaces_another_has_what_came_through_a_group(ray: Any):
    weights = {name: tensor * 1.03 for name, tensor in load_file(MODEL / "transformer" / WEIGHTS).items()}
    with (
        Engine(MODEL, device="cpu") as local,
        _served() as served,
        Client(served.url, timeout_s=WAIT_S) as client,
    ):
        with WeightGroup([client]) as group:
            group.update_weights(weights, bucket_bytes=2**20)
            _kill(served, random.Random(0))
            until(lambda: served.fleet.describe().num_lost == 1 and all_ready(served))
            local.update_weights_from_tensors(weights)
            assert client.weights_checksum() == local.weights_checksum()
            # It is no member of the group, so nobody takes anything from it.
            with pytest.raises(WeightsRejectedError):
                group.update_weights(weights)
            assert client.weights_checksum() == local.weights_checksum()
        with WeightGroup([client]) as group:
            assert group.update_weights(weights) == ["2"]
        assert client.weights_checksum() == local.weights_checksum()
