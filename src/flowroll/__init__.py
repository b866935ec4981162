"""flowroll: a rollout engine for RL post-training of flow-matching text-to-image models.

The engine is `flowroll.engine.Engine`, the HTTP client `flowroll.client.Client`; the types below are what both take and give.
They are imported when they are first used, so that the command line starts without torch. Using them, `flowroll.client` or
`flowroll.sampling` needs torch, not diffusers, transformers or a web framework.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowroll.errors import FlowrollError
    from flowroll.types import (
        DebugTensors,
        DenoisingEnv,
        GeneratedImage,
        Rollout,
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
    "SamplingParams",
    "SamplingRecord",
    "Trajectory",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Imports a name of `__all__` on its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module("flowroll.errors" if name == "FlowrollError" else "flowroll.types"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
