"""The scenes, their prompts and their pictures.

A scene is one shape of one colour at one place on a dark ground, 64 x 64 pixels. Owns the drawing; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

SIZE = 64
GROUND = 0.1
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "pink": (0.95, 0.3, 0.85),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
# Where a shape's middle is: column and row, in pixels.
PLACES: dict[str, tuple[float, float]] = {
    "at the top left": (19.0, 19.0),
    "at the top right": (45.0, 19.0),
    "at the bottom left": (19.0, 45.0),
    "at the bottom right": (45.0, 45.0),
    "in the center": (32.0, 32.0),
}
# Of a shape drawn without jitter.
RADIUS = 12.0
_RADIUS_JITTER, _PLACE_JITTER = 1.5, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a prompt asks for."""

    colour: str
    shape: str
    place: str

    @property
    def prompt(self) -> str:
        """E.g. "a red circle at the top left"."""
        return f"a {self.colour} {self.shape} {self.place}"


SCENES: tuple[Scene, ...] = tuple(
    Scene(colour=colour, shape=shape, place=place) for colour, shape, place in product(COLOURS, SHAPES, PLACES)
)
_BY_PROMPT = {scene.prompt: scene for scene in SCENES}


def scene_of(prompt: str) -> Scene:
    """The scene that a prompt asks for.

    Raises:
        KeyError: It asks for none.
    """
    return _BY_PROMPT[prompt]


def coverage(scene: Scene, *, radius: float = RADIUS, shift: tuple[float, float] = (0.0, 0.0)) -> Float[Tensor, "height width"]:
    """The share of each pixel that the shape covers, in [0, 1].

    Args:
        scene: Whose shape and place.
        radius: The radius of the circle, pixels; the other shapes have about its area.
        shift: Columns and rows by which the shape is off its place.
    """
    column, row = PLACES[scene.place]
    middles = torch.arange(SIZE) + 0.5
    x = middles[None, :] - column - shift[0]
    y = middles[:, None] - row - shift[1]
    return (_depth(scene.shape, x, y, radius) + 0.5).clamp(0, 1)


def draw(scene: Scene, generator: torch.Generator | None = None) -> Float[Tensor, "3 height width"]:
    """A picture of the scene, values in [0, 1]; with a generator, a little off its place and size."""
    radius, shift = RADIUS, (0.0, 0.0)
    if generator is not None:
        dr, dx, dy = (2 * torch.rand(3, generator=generator) - 1).tolist()
        radius, shift = RADIUS + _RADIUS_JITTER * dr, (_PLACE_JITTER * dx, _PLACE_JITTER * dy)
    share = coverage(scene, radius=radius, shift=shift)
    colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1)
    return GROUND + share * (colour - GROUND)


def _depth(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Distance to the edge, positive inside."""
    if shape == "circle":
        return radius - (x.square() + y.square()).sqrt()
    if shape == "square":
        return 0.89 * radius - torch.maximum(x.abs(), y.abs())
    # Equilateral, point up: three half planes; as much room above its place as below.
    inner = 0.78 * radius
    y = y - inner / 2
    left, right = (-0.5 * y + 3**0.5 / 2 * x), (-0.5 * y - 3**0.5 / 2 * x)
    return inner - torch.maximum(y.expand_as(left), torch.maximum(left, right))
