"""flowroll: a rollout engine for RL post-training of flow-matching text-to-image models.

    from flowroll import Client, Engine, Rollout, load_rollouts, save_rollouts

`Engine` runs a model in this process, `Client` speaks to a server, and the types below are what both take and give; a store of
rollouts on the disk is `RolloutStore`. Everything is imported when it is first used: `import flowroll` needs nothing, the types
need torch, `Client` also httpx, the store also pyarrow, and `Engine` alone needs diffusers and transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowroll.client import AsyncClient as AsyncClient
    from flowroll.client import Client as Client
    from flowroll.engine import Engine as Engine
    from flowroll.errors import FlowrollError
    from flowroll.store import RolloutStore as RolloutStore
    from flowroll.store import load_rollouts as load_rollouts
    from flowroll.store import save_rollouts as save_rollouts
    from flowroll.types import (
        DebugTensors,
        DenoisingEnv,
        GeneratedImage,
        Rollout,
        RolloutStack,
        SamplingParams,
        SamplingRecord,
        Trajectory,
    )

__version__ = "0.1.0"

__all__ = [
    "DebugTensors",
    "DenoisingEnv",
    "FlowrollError",
    "GeneratedImage",
    "Rollout",
    "RolloutStack",
    "SamplingParams",
    "SamplingRecord",
    "Trajectory",
    "__version__",
]
# What needs more than torch; `from flowroll import *` leaves it out.
_FURTHER = {
    "AsyncClient": "flowroll.client",
    "Client": "flowroll.client",
    "Engine": "flowroll.engine",
    "RolloutStore": "flowroll.store",
    "load_rollouts": "flowroll.store",
    "save_rollouts": "flowroll.store",
}


def __getattr__(name: str) -> object:
    """Imports a name on its first use (PEP 562)."""
    if name not in __all__ and name not in _FURTHER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "flowroll.errors" if name == "FlowrollError" else _FURTHER.get(name, "flowroll.types")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FURTHER})
