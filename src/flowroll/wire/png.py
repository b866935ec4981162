"""The forms in which a request may ask for a picture. A PNG needs Pillow, which the engine's extra installs."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowroll.extras import check_installed, extra_for
from flowroll.types import ImageFormat
from flowroll.types.pictures import encode_png, to_uint8

__all__ = ["encode_png", "in_format", "to_uint8"]

with extra_for("A PNG file", "engine"):
    check_installed("PIL")


def in_format(image: Float[Tensor, " colors 1 height width"], image_format: ImageFormat) -> Tensor | bytes:
    """Returns an image in [0, 1] in the form that a request asks for, which is not "none"."""
    assert image_format != "none"
    if image_format == "tensor":
        return image
    return to_uint8(image) if image_format == "uint8" else encode_png(image)
