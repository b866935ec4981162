"""verl-omni's own worker, unmodified, on a local Ray cluster and the CPU: its FSDP2 engine, adapters and updates of weights."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.verl_omni.cases import sampling
from tests.integrations.verl_omni.test_server import rows, transformer_of
from tests.integrations.verl_omni.test_trainer import batch_of
from tests.integrations.verl_omni.test_verl import assert_ratio_is_one, samples, shut_down

from flowroll import replay

pytestmark = pytest.mark.slow
SIZES = {"height": 64, "width": 64, "vae_scale_factor": 8}
LORA = ["model.lora_rank=2", "model.lora_alpha=4", "model.target_modules=[to_q,to_k]"]
OLD = [*LORA, "model.policy_state_adapters=[default,old]", "rollout.rollout_adapter=old"]


def config_of(root: Path, folder: Path, ranks: int, *changes: str) -> Any:
    """verl-omni's own configuration, with what a machine without devices and a tiny model need."""
    from omegaconf import OmegaConf

    whole = OmegaConf.load(root / "trainer" / "config" / "_generated_diffusion_trainer.yaml")
    own = [
        f"model.path={folder}",
        "model.external_lib=flowroll.integrations.verl_omni",
        "model.attn_backend=native",
        "actor.strategy=fsdp2",
        "actor.ppo_micro_batch_size_per_gpu=1",
        "rollout.name=flowroll",
        "rollout.dtype=float32",
        "rollout.load_format=safetensors",
        "rollout.engine_kwargs.flowroll.device=cpu",
        "rollout.engine_kwargs.flowroll.gather_ms=100",
        f"rollout.tensor_model_parallel_size={ranks}",
        f"rollout.n_gpus_per_node={ranks}",
    ]
    lines = [f"actor_rollout_ref.{line}" for line in [*own, *changes]]
    return OmegaConf.merge(whole, OmegaConf.from_dotlist(lines))


def trainer_of(config: Any, ranks: int, name: str) -> Any:
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    worker = importlib.import_module("omni_trainer").OmniTrainer
    made = RayClassWithInitArgs(cls=ray.remote(worker), config=config.actor_rollout_ref, role="actor_rollout")
    pool = RayResourcePool([ranks], use_gpu=True, max_colocate_count=2, name_prefix=name)
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, name_prefix=name, device_name="cpu")
    group.init_model()
    return group


def model_of(trainer: Any, folder: Path, adapter: str | None) -> torch.nn.Module:
    """The trainer's transformer, put together from its parameters by their names, with one of its adapters active."""
    peft = pytest.importorskip("peft")
    made = transformer_of(folder)
    if adapter is not None:
        for name in ("default", "old"):
            made.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"]), adapter_name=name)
        made.set_adapter(adapter)
    parameters = trainer.parameters()[0]
    assert set(parameters) <= {name for name, _ in made.named_parameters()} and len(parameters) > 50
    made.load_state_dict(parameters, strict=False)
    return made


@pytest.fixture
def managers(cluster: Any, verl_omni: Path) -> Any:
    from verl.workers.rollout.llm_server import LLMServerManager
    from verl_omni.workers.checkpoint_engine import OmniCheckpointEngineManager

    return LLMServerManager, OmniCheckpointEngineManager


def test_the_old_policy_rolls_out_on_two_ranks(cluster: Any, managers: Any, verl_omni: Path, qwen_checkpoint: Path) -> None:
    from verl.workers.config import CheckpointEngineConfig

    config = config_of(verl_omni, qwen_checkpoint, 2, *OLD)
    trainer = trainer_of(config, 2, "old_policy")
    manager = managers[0].create(config, worker_group=trainer)
    weights = managers[1](CheckpointEngineConfig(backend="naive"), trainer, manager.get_replicas())

    weights.update_weights(global_steps=1)
    (first,) = samples(manager, qwen_checkpoint, (1,))
    assert (first.extra_fields["flowroll_adapter"], first.extra_fields["global_steps"]) == ("old", 1)
    assert_ratio_is_one(model_of(trainer, qwen_checkpoint, "old"), [first])

    trainer.move(1)
    weights.update_weights(global_steps=2)
    (second,) = samples(manager, qwen_checkpoint, (1,))
    # The adapter in training has moved, and the old one has not.
    assert torch.equal(second.diffusion_output, first.diffusion_output) and second.extra_fields["global_steps"] == 2

    trainer.copy_adapter(source="default", target="old")
    trainer.move(2)
    trainer.ema_update_adapter(source="default", target="old", decay=0.5)
    weights.sleep_replicas()
    weights.update_weights(global_steps=3)
    third = samples(manager, qwen_checkpoint, (1, 2))
    assert not torch.equal(third[0].diffusion_output, first.diffusion_output)
    assert_ratio_is_one(model_of(trainer, qwen_checkpoint, "old"), third)
    with torch.no_grad():
        other = replay.log_prob(model_of(trainer, qwen_checkpoint, "default"), rows(third), steps=[0, 1])
    assert not torch.equal(other, torch.stack([one.log_probs for one in third]))
    shut_down(cluster, manager, trainer)


def test_all_weights_come_as_the_engine_rounds_them(
    cluster: Any, managers: Any, verl_omni: Path, qwen_checkpoint: Path
) -> None:
    from verl.workers.config import CheckpointEngineConfig

    config = config_of(verl_omni, qwen_checkpoint, 1, "rollout.load_format=dummy")
    trainer = trainer_of(config, 1, "all_weights")
    manager = managers[0].create(config, worker_group=trainer)
    weights = managers[1](CheckpointEngineConfig(backend="naive"), trainer, manager.get_replicas())
    trainer.move(1)
    weights.update_weights(global_steps=4)
    (made,) = samples(manager, qwen_checkpoint, (1,))
    assert (made.extra_fields["flowroll_adapter"], made.extra_fields["global_steps"]) == (None, 4)
    # Of FSDP2's shards the engine makes bfloat16.
    assert_ratio_is_one(model_of(trainer, qwen_checkpoint, None).bfloat16().float(), [made])
    shut_down(cluster, manager, trainer)


def step_of(trainer: Any, batch: Any) -> dict[str, Any]:
    """A step of the worker's optimizer on a batch, as verl-omni's trainer asks for it."""
    from verl.utils import tensordict_utils

    padding = importlib.import_module("verl_omni.workers.utils.padding")
    trained = padding.embeds_padding_2_no_padding(batch)
    sizes = {"global_batch_size": 2, "mini_batch_size": 2, "epochs": 1, "seed": 1, **SIZES}
    tensordict_utils.assign_non_tensor(trained, dataloader_kwargs={"shuffle": False}, **sizes)
    metrics = tensordict_utils.get(trainer.update_actor(trained), "metrics")
    assert min(torch.tensor(metrics["grad_norm"]).flatten().tolist()) > 0
    return dict(metrics)


def training_lines() -> list[str]:
    given = sampling("qwen_image")
    names = ("height", "width", "num_inference_steps", "true_cfg_scale")
    return [
        *LORA,
        "actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
        "actor.optim.lr=0.01",
        *(f"rollout.pipeline.{name}={given[name]}" for name in names),
        f"rollout.algo.noise_level={given['noise_level']}",
    ]


def test_the_worker_trains_on_rollouts(cluster: Any, managers: Any, verl_omni: Path, qwen_checkpoint: Path) -> None:
    """Rollout, batch, log-probs of the worker's own forward, a step of its optimizer, new weights: twice."""
    from verl.utils import tensordict_utils
    from verl.workers.config import CheckpointEngineConfig

    padding = importlib.import_module("verl_omni.workers.utils.padding")
    loop = importlib.import_module("verl_omni.agent_loop.diffusion_agent_loop")
    # Its engine has no way to merge, and sends the factors all the same.
    config = config_of(verl_omni, qwen_checkpoint, 1, *training_lines(), "model.lora.merge=True")
    trainer = trainer_of(config, 1, "trains")
    manager = managers[0].create(config, worker_group=trainer)
    weights = managers[1](CheckpointEngineConfig(backend="naive"), trainer, manager.get_replicas())
    pictures = []
    for steps in (0, 1):
        weights.update_weights(global_steps=steps)
        made = samples(manager, qwen_checkpoint, (1, 2))
        for one in made:
            assert (one.extra_fields["flowroll_adapter"], one.extra_fields["global_steps"]) == ("default", steps)
        pictures.append(made[0].diffusion_output)
        batch = batch_of(loop, made, 64).to_tensordict()
        inferred = padding.embeds_padding_2_no_padding(batch.clone())
        tensordict_utils.assign_non_tensor(inferred, compute_loss=False, **SIZES)
        log_probs = tensordict_utils.get(trainer.infer_actor_batch(inferred), "log_probs")
        assert ((log_probs - batch["rollout_log_probs"]).exp() - 1).abs().max() < 2e-6
        assert_ratio_is_one(model_of(trainer, qwen_checkpoint, "default"), made)
        weights.sleep_replicas()
        batch["old_log_probs"] = log_probs
        batch["advantages"] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        step_of(trainer, batch)
    assert not torch.equal(*pictures)
    shut_down(cluster, manager, trainer)


def test_diffusion_nft_trains_on_rollouts_of_the_old_policy(
    cluster: Any, managers: Any, verl_omni: Path, qwen_checkpoint: Path
) -> None:
    from verl.workers.config import CheckpointEngineConfig

    loop = importlib.import_module("verl_omni.agent_loop.diffusion_agent_loop")
    loss = importlib.import_module("verl_omni.trainer.diffusion.diffusion_algos").get_diffusion_loss_fn("diffusion_nft")
    lines = ["model.algorithm=diffusion_nft", "model.model_type=diffusion_nft_model", *OLD]
    config = config_of(verl_omni, qwen_checkpoint, 1, *training_lines(), *lines)
    trainer = trainer_of(config, 1, "nft")
    manager = managers[0].create(config, worker_group=trainer)
    weights = managers[1](CheckpointEngineConfig(backend="naive"), trainer, manager.get_replicas())
    trainer.copy_adapter(source="default", target="old")
    clean, deviations = [], []
    for steps, copies in ((0, False), (1, True), (2, False)):
        weights.update_weights(global_steps=steps)
        made = samples(manager, qwen_checkpoint, (1, 2))
        clean.append(made[0].extra_fields["latents_clean"])
        assert {one.extra_fields["flowroll_adapter"] for one in made} == {"old"} and made[0].log_probs is None
        batch = loss.prepare_actor_batch(batch_of(loop, made, 64), torch.tensor([1.0, 0.0]), config)
        deviations.append(step_of(trainer, batch.to_tensordict())["actor/old_deviate"])
        if copies:
            trainer.copy_adapter(source="default", target="old")
    # Steps of the policy in training do not show before they are copied.
    assert torch.equal(clean[0], clean[1]) and not torch.equal(clean[1], clean[2])
    assert torch.tensor(deviations[0]).abs().max() == 0 < torch.tensor(deviations[1]).abs().max()
    shut_down(cluster, manager, trainer)


def test_an_adapter_comes_through_a_checkpoint_engine(
    cluster: Any, managers: Any, verl_omni: Path, qwen_checkpoint: Path, tmp_path: Path
) -> None:
    from verl.workers.config import CheckpointEngineConfig

    engine = {
        "backend": "test_files",
        "custom_backend_module": "trainers",
        "engine_kwargs": {"test_files": {"path": str(tmp_path / "weights.pt")}},
    }
    lines = [
        "rollout.checkpoint_engine.backend=test_files",
        "rollout.checkpoint_engine.custom_backend_module=trainers",
        f"rollout.checkpoint_engine.engine_kwargs.test_files.path={tmp_path / 'weights.pt'}",
        "rollout.nnodes=1",
    ]
    config = config_of(verl_omni, qwen_checkpoint, 1, *OLD, *lines)
    manager = managers[0].create(config, start_rank=1)
    trainer = trainer_of(config, 1, "separate_old_policy")
    weights = managers[1](CheckpointEngineConfig(**engine), trainer, manager.get_replicas())
    trainer.move(1)
    trainer.copy_adapter(source="default", target="old")
    trainer.move(2)
    weights.update_weights(global_steps=8)
    made = samples(manager, qwen_checkpoint, (1, 2))
    assert [(one.extra_fields["flowroll_adapter"], one.extra_fields["global_steps"]) for one in made] == [("old", 8)] * 2
    assert_ratio_is_one(model_of(trainer, qwen_checkpoint, "old"), made)
    shut_down(cluster, manager, trainer)
