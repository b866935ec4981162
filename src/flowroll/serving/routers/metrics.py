"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from flowroll.serving.errors import COMMON_RESPONSES
from flowroll.serving.state import AppState


def build_router(state: AppState) -> APIRouter:
    """Returns the metrics route."""
    router = APIRouter(tags=["status"])

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=COMMON_RESPONSES)
    async def metrics() -> Response:
        return Response(state.metrics.render(await state.status()), media_type=CONTENT_TYPE_LATEST)

    return router
