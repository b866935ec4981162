"""POST /release_memory_occupation and /resume_memory_occupation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastapi import APIRouter, Request

from flowroll.engine.service import CallFuture, EngineService
from flowroll.serving.errors import WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_control
from flowroll.serving.state import CHANGES, AppState
from flowroll.types import MemoryChange
from flowroll.wire.control import MemoryObject, ReleaseRequest, ResumeRequest
from flowroll.wire.names import RELEASE_ROUTE, RESUME_ROUTE


def build_router(state: AppState) -> APIRouter:
    """Returns the routes about memory."""
    router = APIRouter(tags=["weights"])
    engine = state.engine

    @router.post(
        RELEASE_ROUTE,
        summary="Release the memory of the weights",
        description="Waits for the requests that run. Until it is resumed, whatever needs weights is answered with 409, also "
        "requests that wait already.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(ReleaseRequest),
    )
    async def release_memory_occupation(request: Request) -> MemoryObject:
        accepted = await accept_control(request, state, ReleaseRequest, is_optional=True)
        return await _do(accepted, lambda: engine.call(EngineService.sleep, accepted.mode))

    @router.post(
        RESUME_ROUTE,
        summary="Take the memory of the weights again",
        description="Weights, version, adapters and checksums are as they were.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(ResumeRequest),
    )
    async def resume_memory_occupation(request: Request) -> MemoryObject:
        accepted = await accept_control(request, state, ResumeRequest, is_optional=True)
        return await _do(accepted, lambda: engine.call(EngineService.wake))

    async def _do(accepted: ResumeRequest, call: Callable[[], CallFuture[MemoryChange]]) -> MemoryObject:
        # Not beside an update that is being read: it would find no weights to fit in.
        async with state.turn(CHANGES):
            if accepted.means_weights:
                change = await call()
            else:
                change = MemoryChange(mode=(await state.status()).memory_mode, num_bytes=0, seconds=0.0)
        return MemoryObject(is_asleep=change.mode is not None, **dataclasses.asdict(change))

    return router
