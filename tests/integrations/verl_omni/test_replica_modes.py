"""Each way in which verl's own `RolloutReplica` starts, unmodified, on a local Ray cluster."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.verl_omni.cases import arguments_of, prompt_of, sampling
from tests.integrations.verl_omni.test_mapping import transformer_of as transformer_of_family
from tests.integrations.verl_omni.test_server import moved, transformer_of
from tests.integrations.verl_omni.test_verl import (
    WINDOW,
    assert_ratio_is_one,
    config_of,
    facts_of,
    samples,
    shut_down,
    worker_group,
)

from flowroll.errors import AsleepError

pytestmark = pytest.mark.slow


def replica_of(config: Any, rank: int, **values: Any) -> Any:
    from verl.workers.rollout.replica import get_rollout_replica_class

    from flowroll.integrations.verl_omni import register

    register()
    both = config.actor_rollout_ref
    made = get_rollout_replica_class(both.rollout.name)
    return made(replica_rank=rank, config=both.rollout, model_config=both.model, gpus_per_node=1, **values)


def sample(replica: Any, folder: Path, seed: int, family: str = "qwen_image") -> Any:
    prompt = arguments_of(prompt_of(folder, facts_of(folder)))

    async def main() -> Any:
        return await replica.server_handle.generate.remote(
            request_id="a", sampling_params=sampling(family, seed=seed, **WINDOW, sde_window_size=2), **prompt
        )

    return asyncio.run(main())


def assert_sleeps_and_wakes(replica: Any, folder: Path, before: Any) -> None:
    asyncio.run(replica.sleep())
    with pytest.raises(AsleepError):
        sample(replica, folder, 1)
    asyncio.run(replica.wake_up())
    assert torch.equal(sample(replica, folder, 1).diffusion_output, before.diffusion_output)


def test_a_colocated_replica_has_processes_of_its_own_on_the_trainers_devices(
    cluster: Any, qwen_checkpoint: Path, tmp_path: Path
) -> None:
    from verl.checkpoint_engine.base import CheckpointEngineManager
    from verl.workers.config import CheckpointEngineConfig

    engine = {
        "backend": "test_files",
        "custom_backend_module": "trainers",
        "engine_kwargs": {"test_files": {"path": str(tmp_path / "weights.pt")}},
    }
    config = config_of(qwen_checkpoint, engine)
    trainer = worker_group(config, qwen_checkpoint, "beside", hybrid=False)
    replica = replica_of(config, 20)
    asyncio.run(replica.init_colocated(trainer.resource_pool))
    assert replica.rollout_mode.value == "colocated"
    assert not set(replica.workers) & set(trainer.workers) and len(replica.workers) == 1
    # One device, two processes.
    places = cluster.get([worker.get_cuda_visible_devices.remote() for worker in (*trainer.workers, *replica.workers)])
    assert places[0] == places[1] != "not set"

    transformer = transformer_of(qwen_checkpoint)
    first = sample(replica, qwen_checkpoint, 1)
    assert_ratio_is_one(transformer, [first])
    assert_sleeps_and_wakes(replica, qwen_checkpoint, first)
    weights = CheckpointEngineManager(CheckpointEngineConfig(**engine), trainer, [replica])
    trainer.move(1)
    moved(transformer)
    weights.update_weights(global_steps=3)
    second = sample(replica, qwen_checkpoint, 1)
    assert second.extra_fields["global_steps"] == 3 and not torch.equal(second.diffusion_output, first.diffusion_output)
    assert_ratio_is_one(transformer, [second])
    for actor in (*replica.servers, *replica.workers, *trainer.workers):
        cluster.kill(actor)


def test_a_replica_that_judges_has_a_name_of_its_own(cluster: Any, checkpoints: dict[str, Path]) -> None:
    """It runs Stable Diffusion 3, whose prompts come as one list of ids for each encoder."""
    folder = checkpoints["sd3"]
    config = config_of(folder, {"backend": "naive"})
    replica = replica_of(config, 21, is_reward_model=True, name_suffix="b")
    asyncio.run(replica.init_standalone())
    assert cluster.get_actor("flowroll_server_reward_21_0_b") == replica.server_handle
    made = sample(replica, folder, 1, "sd3")
    assert made.extra_fields["prompt_embeds"].shape[0] == 333
    assert_ratio_is_one(transformer_of_family(folder, "sd3"), [made])
    for actor in (*replica.servers, *replica.workers):
        cluster.kill(actor)


def test_a_hybrid_replica_on_a_pool_that_is_given(cluster: Any, qwen_checkpoint: Path) -> None:
    config = config_of(qwen_checkpoint, {"backend": "naive"})
    # The trainer's rank is the number of its replica.
    trainer = worker_group(config, qwen_checkpoint, "pooled", hybrid=True)
    replica = replica_of(config, 0)
    asyncio.run(replica.init_hybrid_colocated(trainer, trainer.resource_pool))
    assert replica.rollout_mode.value == "hybrid" and replica.workers == trainer.workers
    first = sample(replica, qwen_checkpoint, 1)
    assert_ratio_is_one(transformer_of(qwen_checkpoint), [first])
    assert_sleeps_and_wakes(replica, qwen_checkpoint, first)
    # The trainer's own object releases and restores the memory too.
    cluster.get(trainer.release())
    with pytest.raises(AsleepError):
        sample(replica, qwen_checkpoint, 1)
    cluster.get(trainer.resume(["weights"]))
    assert torch.equal(sample(replica, qwen_checkpoint, 1).diffusion_output, first.diffusion_output)
    for actor in (*replica.servers, *trainer.workers):
        cluster.kill(actor)


def test_two_hybrid_replicas_get_the_same_weights(cluster: Any, qwen_checkpoint: Path) -> None:
    from verl.checkpoint_engine.base import CheckpointEngineManager
    from verl.workers.config import CheckpointEngineConfig
    from verl.workers.rollout.llm_server import LLMServerManager

    config = config_of(qwen_checkpoint, {"backend": "naive"})
    trainer = worker_group(config, qwen_checkpoint, "twins", hybrid=True, ranks=2)
    manager = LLMServerManager.create(config, worker_group=trainer)
    assert [replica.workers for replica in manager.get_replicas()] == [[worker] for worker in trainer.workers]
    weights = CheckpointEngineManager(CheckpointEngineConfig(backend="naive"), trainer, manager.get_replicas())
    weights.sleep_replicas()
    trainer.move(1)
    transformer = transformer_of(qwen_checkpoint)
    moved(transformer)
    weights.update_weights(global_steps=2)
    made = [sample(replica, qwen_checkpoint, 1) for replica in manager.get_replicas()]
    assert torch.equal(made[0].diffusion_output, made[1].diffusion_output)
    assert [one.extra_fields["global_steps"] for one in made] == [2, 2]
    assert_ratio_is_one(transformer, made)
    # The client spreads its calls over both.
    assert [one.stop_reason for one in samples(manager, qwen_checkpoint, (1, 2, 3, 4))] == ["completed"] * 4
    shut_down(cluster, manager, trainer)
