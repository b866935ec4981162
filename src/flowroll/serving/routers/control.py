"""POST /abort_request, /pause_generation and /continue_generation."""

from __future__ import annotations

from fastapi import APIRouter, Request

from flowroll.engine.service import EngineService
from flowroll.serving.errors import CONTROL_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_control
from flowroll.serving.state import AppState
from flowroll.wire.control import AbortedObject, AbortRequest, ContinueRequest, GenerationObject, PauseRequest
from flowroll.wire.names import ABORT_ROUTE, CONTINUE_ROUTE, PAUSE_ROUTE


def build_router(state: AppState) -> APIRouter:
    """Returns the routes that steer generation."""
    router = APIRouter(tags=["control"])
    engine = state.engine

    @router.post(
        ABORT_ROUTE,
        summary="End requests that wait or run",
        description="By their request id, or all, those for scores too. Samples leave at their next step; the requests are "
        "answered with 499, or with keep_partial with the samples that are finished, if any are.",
        responses=CONTROL_RESPONSES,
        openapi_extra=request_body(AbortRequest),
    )
    async def abort_request(request: Request) -> AbortedObject:
        accepted = await accept_control(request, state, AbortRequest)
        aborted = engine.call(EngineService.abort, accepted.meant, keep_partial=accepted.keep_partial)
        return AbortedObject(num_aborted=await aborted)

    @router.post(
        PAUSE_ROUTE,
        summary="Pause generation",
        description="Requests that wait keep their places, new ones are answered with 409 until /continue_generation.",
        responses=CONTROL_RESPONSES,
        openapi_extra=request_body(PauseRequest),
    )
    async def pause_generation(request: Request) -> GenerationObject:
        accepted = await accept_control(request, state, PauseRequest, is_optional=True)
        await engine.call(EngineService.pause, accepted.mode)
        return await _state()

    @router.post(
        CONTINUE_ROUTE,
        summary="Go on with generation",
        responses=CONTROL_RESPONSES,
        openapi_extra=request_body(ContinueRequest),
    )
    async def continue_generation(request: Request) -> GenerationObject:
        await accept_control(request, state, ContinueRequest, is_optional=True)
        await engine.call(EngineService.resume)
        return await _state()

    async def _state() -> GenerationObject:
        load = (await state.status()).load
        requests = load.requests
        return GenerationObject(is_paused=load.is_paused, num_running=requests.running, num_waiting=requests.pending)

    return router
