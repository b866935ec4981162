"""The rollout engine over diffusers checkpoints: load, plan, encode, denoise, decode."""

from flowroll.extras import extra_for

with extra_for("flowroll.engine", "engine"):
    from flowroll.engine.batching import Accepted, BatchLimits
    from flowroll.engine.config import AdapterLimits, EngineInfo, Limits
    from flowroll.engine.engine import Engine
    from flowroll.engine.follower import follow
    from flowroll.engine.plan import RequestPlan

__all__ = ["Accepted", "AdapterLimits", "BatchLimits", "Engine", "EngineInfo", "Limits", "RequestPlan", "follow"]
