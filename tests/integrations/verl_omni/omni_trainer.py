"""verl-omni's own worker, unmodified, on the CPU. Ray's processes import this module, verl and verl-omni."""

import bare_packages  # noqa: F401  # first
import torch
import verl_omni.pipelines.qwen_image_diffusion_nft.diffusers_training_adapter
import verl_omni.pipelines.qwen_image_flow_grpo.diffusers_training_adapter  # noqa: F401
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine.base import EngineRegistry
from verl_omni.workers.engine.fsdp import diffusers_impl
from verl_omni.workers.engine_workers import ActorRolloutRefWorker

# verl-omni registers its engines for devices alone.
for _kind, _engine in (
    ("diffusion_model", diffusers_impl.PPODiffusersFSDPEngine),
    ("diffusion_nft_model", diffusers_impl.NFTDiffusersFSDPEngine),
):
    EngineRegistry.register(model_type=_kind, backend=["fsdp", "fsdp2"], device="cpu")(_engine)


class OmniTrainer(ActorRolloutRefWorker):
    """`ActorRolloutRefWorker` with a group of processes of gloo, and what a test has to see and do."""

    def __init__(self, **values: object) -> None:
        # The worker's own asks for two backends of the CPU.
        initialize_global_process_group_ray(backend="cpu:gloo")
        super().__init__(**values)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def move(self, seed: int) -> None:
        """Moves what is trained, as a step of an optimizer does."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.actor.engine.module.parameters():
                if weight.requires_grad:
                    local = getattr(weight, "_local_tensor", weight)
                    local.add_(0.05 * torch.randn(weight.shape, generator=generator)[: len(local)])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def parameters(self) -> dict[str, torch.Tensor]:
        """All parameters by their own names."""
        module = self.actor.engine.module
        return {
            name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
            for name, weight in module.named_parameters()
        }
