"""Results as HTTP answers. Nothing here runs on the event loop but the sending."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from flowroll.serving.middleware import context_of
from flowroll.wire.body import EncodedBody


def whole(request: Request, content: bytes, media_type: str, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an answer that is sent in one piece."""
    if (held := context_of(request).held) is not None:
        held.made(len(content))
    return Response(content, media_type=media_type, headers=headers)


def stream(request: Request, body: EncodedBody) -> Response:
    """Returns an answer of known length whose bytes are made chunk by chunk, each on a thread, as the client reads."""
    if (held := context_of(request).held) is not None:
        held.made(body.memory_bytes)
    headers = {"Content-Length": str(body.content_length)}
    return StreamingResponse(body.chunks(), media_type=body.content_type, headers=headers)
