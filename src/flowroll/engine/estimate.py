"""Estimates how much memory the samples that run at the same time can take, as a text that a server shows at its start."""

from __future__ import annotations

import math

from flowroll.engine.config import EngineInfo
from flowroll.engine.scheduler import BatchLimits
from flowroll.families import Geometry

_GIB = 2**30


def describe_memory(info: EngineInfo, geometry: Geometry, limits: BatchLimits) -> str:
    """Describes the memory of the weights, and that of samples of the default size and number of steps.

    The activations of a forward are not included, because they depend on the kernels.
    """
    steps, pixels = info.defaults.num_inference_steps, geometry.height * geometry.width
    state = 4 * math.prod(geometry.latent_shape)
    # The noise, mean and velocity of each step, and every state.
    recorded = state * (3 * steps + steps + 1)
    samples = min(limits.max_running_samples, max(limits.max_running_pixels // pixels, 1))
    batch = min(samples, limits.max_batch_samples)
    return (
        f"transformer {info.transformer_bytes / _GIB:.2f} GiB; {samples} samples of {geometry.width} x {geometry.height}: "
        f"{samples * state / _GIB:.2f} GiB of latents, or {samples * recorded / _GIB:.2f} GiB with every tensor recorded; "
        f"beside them the activations of a forward of {batch}"
    )
