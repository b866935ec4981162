"""Images in eight bits, and as PNG, which needs Pillow, which the client does not need."""

from __future__ import annotations

import io

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowroll.extras import extra_for
from flowroll.types import ImageFormat

with extra_for("A PNG file", "engine"):
    from PIL import Image


def to_uint8(image: Float[Tensor, " colors 1 height width"]) -> UInt8[Tensor, " colors 1 height width"]:
    """Rounds an image in [0, 1] to eight bits, as diffusers' own image processor does."""
    return image.mul(255).round().clamp(0, 255).byte()


def encode_png(image: Float[Tensor, " colors 1 height width"] | UInt8[Tensor, " colors 1 height width"]) -> bytes:
    """Encodes an image as 8-bit PNG.

    Args:
        image: The image in [0, 1], or its eight bits, on the CPU.
    """
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, 0].permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def in_format(image: Float[Tensor, " colors 1 height width"], image_format: ImageFormat) -> Tensor | bytes:
    """Returns an image in [0, 1] in the form that a request asks for, which is not "none"."""
    assert image_format != "none"
    if image_format == "tensor":
        return image
    return to_uint8(image) if image_format == "uint8" else encode_png(image)
