"""Noise that depends only on the sample's seed and the step.

Owns the seed of every random number of a rollout. The initial noise of a sample is drawn as the diffusers pipeline draws it,
at batch 1 from a generator seeded with the sample's seed; the noise of step k comes from a generator keyed by `step_seed`.
So it cannot depend on the group size, the batch, the parallel layout or which other steps are stochastic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_MASK64 = 2**64 - 1


def step_seed(seed: int, step: int) -> int:
    """Returns the 64-bit generator seed of one step of one sample.

    The pair is packed as `seed * 2^32 + step`, advanced by the golden-ratio increment and finalised as splitmix64 does;
    then the upper half is folded into the lower (`z ^ (z >> 32)`), because CPU generators use only the low 32 bits of a
    seed. Every part is a bijection on 64 bits, so two different pairs never share all 64 bits.

    Args:
        seed: The sample's seed, in [0, 2^32).
        step: The step index, in [0, 2^32).

    Returns:
        An integer in [0, 2^64).

    Reference:
        Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014); constants of the splitmix64
        generator of the Java 8 standard library.
    """
    assert 0 <= seed < 2**32 and 0 <= step < 2**32
    z = ((seed << 32 | step) + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return z ^ (z >> 32)


def child_seed(seed: int, step: int, child: int) -> int:
    """Returns the seed of a child that forks off at a step: that of the step's noise, and one more for each child.

        (step_seed(seed, step) + 1 + child) mod 2^32

    So the children of one fork have seeds of their own; two children of different parents share one with the chance of a
    collision of 32 bits.

    Args:
        seed: The parent's seed, in [0, 2^32).
        step: The step at which it forks.
        child: The place of the child among its siblings, counted from 0.
    """
    return (step_seed(seed, step) + 1 + child) % 2**32


def step_noise(seed: int, step: int, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Float[Tensor, " ..."]:
    """Draws the standard normal float32 noise of one step of the sample with this seed.

    Args:
        seed: The sample's seed.
        step: The step index, counted from 0.
        shape: Shape of one sample's latents, without batch dimension.
        device: The device that draws the numbers; different devices draw different numbers.

    Returns:
        Noise of that shape, on that device.
    """
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)


def initial_noise(
    seed: int, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Float[Tensor, " ..."]:
    """Draws the noise of one sample as a diffusers pipeline does with `torch.Generator(device).manual_seed(seed)`.

    Args:
        seed: The sample's seed.
        shape: The pipeline's noise shape at batch 1, batch dimension included.
        dtype: The dtype in which the pipeline draws; another dtype gives other numbers.
        device: Where the numbers are drawn.

    Returns:
        Noise of that shape and dtype, on that device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)


def moved(drawn: Float[Tensor, " ..."], device: torch.device) -> Float[Tensor, " ..."]:
    """Moves noise to a device; the host does not wait until it has arrived on a GPU, for which it must lie in pinned memory."""
    if drawn.device.type == "cpu" and device.type == "cuda":
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)
