"""Latents as packed tokens: each token holds a patch of 2 x 2 cells, channel by channel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def pack(cells: Float[Tensor, "channels height width"]) -> Float[Tensor, "tokens packed"]:
    """Makes tokens of latent cells, row by row of patches; height and width are even."""
    channels, height, width = cells.shape
    patches = cells.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return patches.reshape(height // 2 * (width // 2), channels * 4)


def unpack(tokens: Float[Tensor, "tokens packed"], rows: int, columns: int) -> Float[Tensor, "channels height width"]:
    """Makes latent cells of tokens.

    Args:
        tokens: One token per patch.
        rows: The number of rows of patches.
        columns: The number of columns of patches.
    """
    channels = tokens.shape[-1] // 4
    grid = tokens.view(rows, columns, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, 2 * rows, 2 * columns)
