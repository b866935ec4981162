"""Results as HTTP answers. Nothing here runs on the event loop but the sending."""

from __future__ import annotations

import io

from fastapi import Response
from fastapi.responses import StreamingResponse
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowroll.wire.body import EncodedBody


def stream(body: EncodedBody) -> Response:
    """An answer whose length is known and whose bytes are made chunk by chunk, each on a thread, as the client reads."""
    headers = {"Content-Length": str(body.content_length)}
    return StreamingResponse(body.chunks(), media_type=body.content_type, headers=headers)


def png(image: Float[Tensor, " 3 1 height width"]) -> bytes:
    """A picture as PNG, with the rounding of diffusers' own image processor.

    Args:
        image: In [0, 1], on the CPU.
    """
    pixels = image[:, 0].permute(1, 2, 0).mul(255).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
