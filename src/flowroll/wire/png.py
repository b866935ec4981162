"""Encodes images as PNG. It needs Pillow, which the client does not need."""

from __future__ import annotations

import io

from jaxtyping import Float
from torch import Tensor

from flowroll.extras import extra_for

with extra_for("A PNG file", "engine"):
    from PIL import Image


def encode_png(image: Float[Tensor, " colors 1 height width"]) -> bytes:
    """Encodes an image as 8-bit PNG, with the rounding of diffusers' own image processor.

    Args:
        image: The image in [0, 1], on the CPU.
    """
    pixels = image[:, 0].permute(1, 2, 0).mul(255).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
