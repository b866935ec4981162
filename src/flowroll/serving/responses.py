"""Results as HTTP answers. Nothing here runs on the event loop but the sending."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import StreamingResponse

from flowroll.wire.body import EncodedBody


def stream(body: EncodedBody) -> Response:
    """Returns an answer of known length whose bytes are made chunk by chunk, each on a thread, as the client reads."""
    headers = {"Content-Length": str(body.content_length)}
    return StreamingResponse(body.chunks(), media_type=body.content_type, headers=headers)
