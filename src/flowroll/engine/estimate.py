"""How much memory the samples that run at once can take, said in words when a server starts."""

from __future__ import annotations

import math

from flowroll.engine.config import EngineInfo
from flowroll.engine.scheduler import BatchLimits
from flowroll.families import Geometry

_GIB = 2**30


def describe_memory(info: EngineInfo, geometry: Geometry, limits: BatchLimits) -> str:
    """Weights, and what samples of the default size and number of steps hold.

    A forward's activations, which depend on the kernels, are not in it.
    """
    steps, pixels = info.defaults.num_inference_steps, geometry.height * geometry.width
    state = 4 * math.prod(geometry.latent_shape)
    # Noise, mean and velocity of each step, and every state.
    recorded = state * (3 * steps + steps + 1)
    samples = min(limits.max_running_samples, max(limits.max_running_pixels // pixels, 1))
    batch = min(samples, limits.max_batch_samples)
    return (
        f"transformer {info.transformer_bytes / _GIB:.2f} GiB; {samples} samples of {geometry.width} x {geometry.height}: "
        f"{samples * state / _GIB:.2f} GiB of latents, or {samples * recorded / _GIB:.2f} GiB with every tensor recorded; "
        f"beside them the activations of a forward of {batch}"
    )
