"""A trainer's worker and a checkpoint engine for the tests with verl. Ray's processes import this module, and verl."""

import importlib
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.rollout.base import get_rollout_class


@CheckpointEngineRegistry.register("test_files")
class FilesEngine(CheckpointEngine):
    """Carries weights from trainers to replicas in a file, as verl's own engines do by NCCL."""

    def __init__(self, bucket_size: int, path: str, is_master: bool = False) -> None:
        self._path = Path(path)

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]) -> Any:
        return {"rank": list(range(actor_wg_world_size))}, {"rank": list(range(rollout_world_size))}

    def init_process_group(self, **_: Any) -> None:
        self._path.unlink(missing_ok=True)

    def finalize(self) -> None:
        pass

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> None:
        torch.save(dict(weights), self._path.with_suffix(".part"))
        self._path.with_suffix(".part").rename(self._path)

    async def receive_weights(self, global_steps: int | None = None) -> Any:
        import asyncio

        while not self._path.exists():
            await asyncio.sleep(0.05)
        for pair in torch.load(self._path).items():
            yield pair


class Trainer(Worker):
    """What verl-omni's worker does with a rollout object and a checkpoint engine, around a transformer that only moves."""

    def __init__(self, rollout: DictConfig, model: DictConfig, folder: str, hybrid: bool) -> None:
        super().__init__()
        importlib.import_module(model.external_lib)
        from diffusers import QwenImageTransformer2DModel

        self.transformer = QwenImageTransformer2DModel.from_pretrained(f"{folder}/transformer").eval()
        self.rollout = get_rollout_class(rollout.name, rollout.mode)(rollout, model, None) if hybrid else None
        engine = rollout.checkpoint_engine
        if not hybrid:
            kwargs = engine.engine_kwargs[engine.backend]
            self.checkpoint_engine = CheckpointEngineRegistry.new(engine.backend, bucket_size=1, is_master=True, **kwargs)

    def weights(self) -> Any:
        return ((f"transformer.{name}", tensor) for name, tensor in self.transformer.state_dict().items())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def move(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.transformer.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=generator))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> None:
        if mode != "naive":
            await self.checkpoint_engine.send_weights(self.weights())
            return
        await self.rollout.resume(tags=["weights"])
        await self.rollout.update_weights(self.weights(), peft_config=None, base_sync_done=True, global_steps=global_steps)
        await self.rollout.resume(tags=["kv_cache"])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def release(self) -> None:
        await self.rollout.release()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def resume(self, tags: list[str]) -> None:
        await self.rollout.resume(tags=tags)

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.checkpoint_engine, method)(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def send_adapter(self, factors: dict[str, torch.Tensor], peft_config: dict[str, Any], update_id: str) -> None:
        """As `update_weights` of verl_omni/workers/engine_workers.py sends an adapter in steady state."""
        from flowroll.integrations.verl_omni.transfer import _transfer_module, update_handle

        future = await self.rollout._execute_method(
            "update_weights_from_ipc",
            non_block=True,
            kwargs={
                "peft_config": peft_config,
                "base_sync_done": True,
                "use_shm": self.rollout.use_shm,
                "zmq_update_id": update_id,
            },
        )
        sender = _transfer_module().BucketedWeightSender(
            zmq_handle=update_handle(self.rollout.zmq_handle, update_id), bucket_size_mb=1, use_shm=self.rollout.use_shm
        )
        await sender.async_send_weights(factors.items())
        if future is not None:
            await future
