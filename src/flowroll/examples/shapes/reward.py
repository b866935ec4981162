"""How well a picture shows what its prompt asks for."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.examples.shapes.world import COLOURS, coverage, scene_of

# How far a pixel's colour may be from the prompt's, as a standard deviation of each channel.
_COLOUR_STD = 0.2


def reward(image: Float[Tensor, "3 1 height width"], prompt: str) -> float:
    """Soft intersection over union of the pixels of the prompt's colour with the shape at the prompt's place, in [0, 1].

    With w a pixel's closeness to the colour, exp(-|pixel - colour|^2 / (2 std^2)), and c its coverage by the shape drawn
    without jitter: sum min(w, c) / sum max(w, c). Wrong colour, wrong place and wrong shape all lower it.

    Args:
        image: A rollout's picture, in [0, 1].
        prompt: One of the world's.

    Raises:
        KeyError: The prompt is not of this world.
    """
    scene = scene_of(prompt)
    colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1)
    closeness = torch.exp(-(image[:, 0] - colour).square().sum(dim=0) / (2 * _COLOUR_STD**2))
    covered = coverage(scene)
    return float(torch.minimum(closeness, covered).sum() / torch.maximum(closeness, covered).sum())
