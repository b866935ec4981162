"""verl's own registry, server manager, client and checkpoint manager, unmodified, on a local Ray cluster."""

import asyncio
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.verl_omni.cases import arguments_of, prompt_of, sampling
from tests.integrations.verl_omni.test_server import moved, transformer_of

from flowroll import replay
from flowroll.integrations.verl_omni import rollout_of

pytestmark = pytest.mark.slow
WINDOW = {"sde_window_range": [0, 2]}


def config_of(folder: Path, engine: dict[str, Any], **changes: Any) -> Any:
    """The parts of verl-omni's configuration that verl reads here."""
    from omegaconf import OmegaConf

    rollout = {
        "_target_": "verl.workers.config.RolloutConfig",
        "name": "flowroll",
        "mode": "async",
        "tensor_model_parallel_size": 1,
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "nnodes": 1,
        "n_gpus_per_node": 1,
        "dtype": "float32",
        "free_cache_engine": True,
        "max_num_seqs": 64,
        "disable_log_stats": True,
        "engine_kwargs": {"flowroll": {"device": "cpu", "gather_ms": 100}},
        "disaggregation": {"enabled": False},
        "prometheus": {"enable": False},
        "checkpoint_engine": {"_target_": "verl.workers.config.CheckpointEngineConfig", **engine},
        **changes,
    }
    model = {
        "_target_": "types.SimpleNamespace",
        "path": str(folder),
        "algorithm": "flow_grpo",
        "external_lib": "flowroll.integrations.verl_omni",
    }
    return OmegaConf.create({"actor_rollout_ref": {"rollout": rollout, "model": model}})


def worker_group(config: Any, folder: Path, name: str, *, hybrid: bool, ranks: int = 1) -> Any:
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    both, trainer = config.actor_rollout_ref, importlib.import_module("trainers").Trainer
    made = RayClassWithInitArgs(
        cls=ray.remote(trainer), rollout=both.rollout, model=both.model, folder=str(folder), hybrid=hybrid
    )
    pool = RayResourcePool([ranks], use_gpu=True, max_colocate_count=2, name_prefix=name)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, name_prefix=name, device_name="cpu")


def samples(manager: Any, folder: Path, seeds: tuple[int, ...]) -> list[Any]:
    client, facts = manager.get_client(), facts_of(folder)
    prompt = arguments_of(prompt_of(folder, facts))

    async def all_of_them() -> list[Any]:
        calls = [
            client.generate(f"row {seed}", sampling_params=sampling("qwen_image", seed=seed, **WINDOW), **prompt)
            for seed in seeds
        ]
        return list(await asyncio.gather(*calls))

    return asyncio.run(all_of_them())


def facts_of(folder: Path) -> Any:
    from flowroll.engine import Engine

    with Engine(folder, device="cpu", dtype="float32") as engine:
        return engine.facts


def assert_ratio_is_one(transformer: torch.nn.Module, outputs: list[Any]) -> None:
    rollouts = [rollout_of({**output.extra_fields, "log_probs": output.log_probs}) for output in outputs]
    with torch.no_grad():
        again = replay.log_prob(transformer, rollouts, steps=[0, 1])
    assert torch.equal(again, torch.stack([output.log_probs for output in outputs]))


def shut_down(ray: Any, manager: Any, *groups: Any) -> None:
    for actor in [*manager.server_handles, *[worker for replica in manager.get_replicas() for worker in replica.workers]]:
        ray.kill(actor)
    for group in groups:
        for worker in group.workers:
            ray.kill(worker)


def test_a_colocated_trainer_rolls_out_and_sends_its_weights(cluster: Any, qwen_checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    from verl.checkpoint_engine.base import CheckpointEngineManager
    from verl.workers.config import CheckpointEngineConfig
    from verl.workers.rollout.llm_server import LLMServerManager

    config = config_of(qwen_checkpoint, {"backend": "naive"})
    trainer = worker_group(config, qwen_checkpoint, "hybrid_trainer", hybrid=True)
    manager = LLMServerManager.create(config, worker_group=trainer)
    weights = CheckpointEngineManager(CheckpointEngineConfig(backend="naive"), trainer, manager.get_replicas())

    transformer = transformer_of(qwen_checkpoint)
    first = samples(manager, qwen_checkpoint, (1, 2, 2**62))
    assert [one.stop_reason for one in first] == ["completed"] * 3 and first[2].extra_fields["flowroll_seed"] == 2**62
    assert_ratio_is_one(transformer, first)

    weights.sleep_replicas()
    trainer.move(1)
    moved(transformer)
    weights.update_weights(global_steps=5)
    second = samples(manager, qwen_checkpoint, (1, 2))
    assert [one.extra_fields["global_steps"] for one in second] == [5, 5]
    assert [one.extra_fields["min_global_steps"] for one in second] == [5, 5]
    assert not torch.equal(first[0].diffusion_output, second[0].diffusion_output)
    assert_ratio_is_one(transformer, second)

    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False))
    factors = {f"transformer.{name}": one.detach() for name, one in peft.get_peft_model_state_dict(transformer).items()}
    cluster.get(trainer.send_adapter(factors, transformer.peft_config["default"].to_dict(), "step-6-seq-0"))
    third = samples(manager, qwen_checkpoint, (1,))
    assert not torch.equal(third[0].diffusion_output, second[0].diffusion_output)
    assert_ratio_is_one(transformer, third)
    shut_down(cluster, manager, trainer)


def test_a_standalone_replica_gets_weights_through_a_checkpoint_engine(
    cluster: Any, qwen_checkpoint: Path, tmp_path: Path
) -> None:
    from verl.checkpoint_engine.base import CheckpointEngineManager
    from verl.workers.config import CheckpointEngineConfig
    from verl.workers.rollout.llm_server import LLMServerManager

    engine = {
        "backend": "test_files",
        "custom_backend_module": "trainers",
        "engine_kwargs": {"test_files": {"path": str(tmp_path / "weights.pt")}},
    }
    config = config_of(qwen_checkpoint, engine)
    manager = LLMServerManager.create(config, start_rank=1)
    trainer = worker_group(config, qwen_checkpoint, "separate_trainer", hybrid=False)
    weights = CheckpointEngineManager(CheckpointEngineConfig(**engine), trainer, manager.get_replicas())
    transformer = transformer_of(qwen_checkpoint)
    first = samples(manager, qwen_checkpoint, (1,))
    assert_ratio_is_one(transformer, first)
    trainer.move(1)
    moved(transformer)
    weights.update_weights(global_steps=7)
    second = samples(manager, qwen_checkpoint, (1, 2))
    assert [one.extra_fields["global_steps"] for one in second] == [7, 7]
    assert_ratio_is_one(transformer, second)
    # A standalone replica has its devices to itself.
    weights.sleep_replicas()
    assert samples(manager, qwen_checkpoint, (1,))[0].stop_reason == "completed"
    asyncio.run(manager.get_replicas()[0].abort_all_requests(reject_request=True))
    assert samples(manager, qwen_checkpoint, (1,))[0].stop_reason == "aborted"
    if (found := importlib.util.find_spec("verl_omni")) is not None:
        retried = asyncio.run(until_resumed(manager, qwen_checkpoint, Path(found.submodule_search_locations[0])))
        assert retried.stop_reason == "completed"
        assert (retried.extra_fields["min_global_steps"], retried.extra_fields["max_global_steps"]) == (7, 7)
    shut_down(cluster, manager, trainer)


async def until_resumed(manager: Any, folder: Path, root: Path) -> Any:
    """A sample by verl-omni's client, which asks again for what was aborted, while the server takes samples again."""
    spec = importlib.util.spec_from_file_location("retry", root / "workers/rollout/diffusion_llm_server.py")
    assert spec is not None and spec.loader is not None
    retry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(retry)
    client = manager.get_client(client_cls=retry.DiffusionWholeSampleRetryLLMServerClient, max_retries=20, retry_wait_s=0.3)
    prompt = arguments_of(prompt_of(folder, facts_of(folder)))
    sample = asyncio.create_task(client.generate("row", sampling_params=sampling("qwen_image", seed=1, **WINDOW), **prompt))
    await asyncio.sleep(1)
    await manager.get_replicas()[0].resume_generation()
    return await sample
