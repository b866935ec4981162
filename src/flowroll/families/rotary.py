"""Position ids of tokens, and the rotary table of them, which SGLang-Diffusion sends in their place.

A token at position p of an axis of width d is turned by the angles p theta^(-2k / d), k = 0 .. d/2 - 1. The table holds the
cosines and the sines of all axes side by side, computed in float64 as diffusers and SGLang-Diffusion compute them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from flowroll.types import EnvValue, Number

# Far above the rounding of a float32 cosine, and far below the difference between two positions.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryTable:
    """The table by which SGLang-Diffusion replaces the ids of a branch's text and image.

    Attributes:
        name: The name of the table: a list of cosines and sines [tokens, width / 2], float32, those of the text first.
        text: The name of the field that holds the ids of the text.
        image: The name of the field that holds the ids of the image.
        theta: The base of the frequencies.
        ids: Makes the ids of the text and of the image, from the number of text tokens and the rows and columns of patches. If
            they are floats, they have the dtype of the text embedding in an environment.
    """

    name: str
    text: str
    image: str
    theta: Number
    ids: Callable[[int, int, int], tuple[Tensor, Tensor]]

    def position_ids(self, num_text: int, rows: int, columns: int) -> dict[str, EnvValue]:
        """Returns the fields with the ids of so many text tokens and of an image of so many rows and columns of patches."""
        return dict(zip((self.text, self.image), self.ids(num_text, rows, columns), strict=True))

    def replace_ids(self, branch: Mapping[str, EnvValue], axes: Sequence[int]) -> dict[str, EnvValue]:
        """Returns a branch with the table in place of the ids."""
        ids = torch.cat([cast(Tensor, branch[self.text]), cast(Tensor, branch[self.image])])
        others = {key: value for key, value in branch.items() if key not in (self.text, self.image)}
        return {**others, self.name: [*rotary_table(ids, axes, self.theta)]}

    def restore_ids(
        self, branch: Mapping[str, EnvValue], embeds: object, axes: Sequence[int], *, height: int, width: int
    ) -> dict[str, EnvValue]:
        """Returns a branch with the ids in place of the table.

        Args:
            branch: A branch with the table.
            embeds: The text embedding of the branch.
            axes: The widths of the axes.
            height: Height of the image, in any unit.
            width: Width of the image, in the same unit.

        Raises:
            ValueError: The table is not that of a text of this length and an image of these proportions.
        """
        table = branch[self.name]
        tensors = [part for part in table if isinstance(part, Tensor)] if isinstance(table, list) else []
        if not isinstance(embeds, Tensor) or embeds.ndim != 2 or [part.ndim for part in tensors] != [2, 2]:
            raise ValueError(f"{self.name} that is no list of cosines and sines of a text and an image")
        num_text = len(embeds)
        rows, columns = _grid(len(tensors[0]) - num_text, height, width)
        made = self.ids(num_text, rows, columns)
        text, image = (one.to(embeds.dtype) if one.is_floating_point() else one for one in made)
        if len(axes) != text.shape[1] or any(axis < 2 or axis % 2 for axis in axes) or sum(axes) != 2 * tensors[0].shape[1]:
            raise ValueError(f"{self.name} of {tensors[0].shape[1]} columns beside a record with rope_axes {list(axes)[:8]}")
        expected = rotary_table(torch.cat([text, image]), axes, self.theta)
        for part, right in zip(tensors, expected, strict=True):
            if part.shape != right.shape or not torch.allclose(part.to(right), right, rtol=0, atol=_TOLERANCE):
                raise ValueError(f"{self.name} that is not the table of {num_text} text tokens and {rows} x {columns} patches")
        others = {key: value for key, value in branch.items() if key != self.name}
        return {**others, self.text: text, self.image: image}


def image_ids(rows: int, columns: int) -> Int[Tensor, "image_tokens 3"]:
    """Returns the position of every image token: 0, its row, its column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)


def rotary_table(
    ids: Shaped[Tensor, "all_tokens axes"], axes: Sequence[int], theta: Number
) -> tuple[Float[Tensor, "all_tokens half"], Float[Tensor, "all_tokens half"]]:
    """Returns the cosines and the sines of the angles by which tokens are turned.

    Args:
        ids: The position of every token on every axis.
        axes: The width of every axis, an even number.
        theta: The base of the frequencies.
    """
    angles = []
    for axis, width in enumerate(axes):
        frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(torch.outer(ids[:, axis].double(), frequencies))
    joined = torch.cat(angles, dim=1)
    return joined.cos().float(), joined.sin().float()


def _grid(num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns of so many image tokens in an image of these proportions; 0, 0 if there are none such."""
    if min(num_tokens, height, width) < 1:
        return 0, 0
    rows = math.isqrt(num_tokens * height // width)
    columns = num_tokens // rows if rows else 0
    fits = rows * columns == num_tokens and rows * width == columns * height
    return (rows, columns) if fits else (0, 0)
