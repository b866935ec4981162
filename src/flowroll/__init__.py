"""flowroll: a rollout engine for RL post-training of flow-matching text-to-image models.

Importing this package, `flowroll.client` or `flowroll.sampling` needs torch, not diffusers, transformers or a web framework.
The engine is `flowroll.engine.Engine`, the HTTP client `flowroll.client.Client`.
"""

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
