"""The rollout engine for diffusers checkpoints: it loads, plans, encodes, denoises and decodes."""

from flowroll.extras import check_installed, extra_for

with extra_for("flowroll.engine", "engine"):
    # Only checked here, because their imports take seconds. `engine.loading` imports them when it loads a checkpoint, which
    # a server's process does not do.
    check_installed("accelerate", "diffusers", "transformers")
    from flowroll.engine.config import AdapterLimits, EngineInfo, Limits
    from flowroll.engine.engine import Engine
    from flowroll.engine.plan import RequestPlan
    from flowroll.engine.runner.worker import follow
    from flowroll.engine.scheduler import BatchLimits, RequestFuture

__all__ = ["AdapterLimits", "BatchLimits", "Engine", "EngineInfo", "Limits", "RequestFuture", "RequestPlan", "follow"]
