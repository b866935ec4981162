"""Pictures as people look at them: in eight bits, as PNG, as Pillow's images.

Pillow is imported on use, because what a trainer imports does not need it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowroll.extras import extra_for
from flowroll.types.params import ImageFormat

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(image: Float[Tensor, " colors 1 height width"]) -> UInt8[Tensor, " colors 1 height width"]:
    """Rounds an image in [0, 1] to eight bits, as diffusers' own image processor does."""
    return image.mul(255).round().clamp(0, 255).byte()


def in_format(image: Float[Tensor, " colors 1 height width"], image_format: ImageFormat) -> Tensor | bytes:
    """Returns an image in [0, 1] in the form that a request asks for, which is not "none"."""
    assert image_format != "none"
    if image_format == "tensor":
        return image
    return to_uint8(image) if image_format == "uint8" else encode_png(image)


def pil_image(image: Float[Tensor, " colors 1 height width"] | UInt8[Tensor, " colors 1 height width"] | bytes) -> Image:
    """Makes Pillow's image of a picture, RGB, or RGBA where it has four channels.

    Args:
        image: The picture in [0, 1], its eight bits, or the bytes of a PNG file.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    with extra_for("A picture", "client"):
        import PIL.Image

    if isinstance(image, bytes):
        return PIL.Image.open(io.BytesIO(image))
    pixels = image if image.dtype == torch.uint8 else to_uint8(image.float())
    return PIL.Image.fromarray(pixels[:, 0].permute(1, 2, 0).contiguous().cpu().numpy())


def encode_png(image: Float[Tensor, " colors 1 height width"] | UInt8[Tensor, " colors 1 height width"] | bytes) -> bytes:
    """Encodes a picture as 8-bit PNG; the bytes of a PNG file stay as they are.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    pil_image(image).save(buffer, format="PNG")
    return buffer.getvalue()
