"""The rollout engine over diffusers checkpoints: load, plan, encode, denoise, decode."""

from flowroll.extras import check_installed, extra_for

with extra_for("flowroll.engine", "engine"):
    # They take seconds to import: `engine.loading` does so when a checkpoint is loaded, which a server does not.
    check_installed("accelerate", "diffusers", "transformers")
    from flowroll.engine.config import AdapterLimits, EngineInfo, Limits
    from flowroll.engine.engine import Engine
    from flowroll.engine.plan import RequestPlan
    from flowroll.engine.runner.worker import follow
    from flowroll.engine.scheduler import BatchLimits, RequestFuture

__all__ = ["AdapterLimits", "BatchLimits", "Engine", "EngineInfo", "Limits", "RequestFuture", "RequestPlan", "follow"]
