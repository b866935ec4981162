"""Is it alive, does it take requests, can it generate. All of these answer while a generation runs."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from flowroll.errors import AsleepError, EngineError, FlowrollError, PausedError, ShuttingDownError
from flowroll.serving.errors import COMMON_RESPONSES, ErrorBody, error_response
from flowroll.serving.probe import Evidence
from flowroll.serving.state import AppState


class Health(BaseModel):
    """The check passed."""

    status: Literal["ok"] = "ok"


class EngineHealth(Health):
    """The engine is there."""

    is_asleep: bool = Field(description="Whether the memory of the weights is released.")


class GenerationHealth(Health):
    """The engine generates."""

    evidence: Evidence = Field(
        description="recent: a request ended well in the last 30 s; running: one is making progress; probe: a one-step image; "
        "paused: generation is paused; asleep: the memory of the weights is released."
    )


_FAILED: dict[int | str, dict[str, object]] = {
    **COMMON_RESPONSES,
    503: {"model": ErrorBody, "description": "The check failed"},
}


def build_router(state: AppState) -> APIRouter:
    """The health routes."""
    router = APIRouter(tags=["health"])
    worker = state.worker

    @router.get("/liveness", summary="The process answers", description="Open even where the server demands a token.")
    async def liveness() -> Health:
        return Health()

    @router.get("/health", summary="The engine's thread lives", response_model=EngineHealth, responses=_FAILED)
    async def health() -> EngineHealth | Response:
        if not worker.is_alive:
            return _unavailable(EngineError("the engine's thread must live, got its end; restart the server."))
        return EngineHealth(is_asleep=worker.engine.is_asleep)

    @router.get("/readiness", summary="New requests are taken", response_model=Health, responses=_FAILED)
    async def readiness() -> Health | Response:
        if not worker.is_accepting:
            return _unavailable(
                ShuttingDownError("the server must take requests to be ready, got a shutdown; use another replica.")
            )
        if worker.engine.is_asleep:
            return _unavailable(AsleepError("the engine must be awake to be ready, got released memory; wake it."))
        if worker.is_paused:
            return _unavailable(PausedError("generation must go on to be ready, got a pause; continue it."))
        return Health()

    @router.get("/health_generate", summary="The engine generates", response_model=GenerationHealth, responses=_FAILED)
    async def health_generate() -> GenerationHealth | Response:
        try:
            return GenerationHealth(evidence=await state.probe.check())
        except FlowrollError as error:
            return _unavailable(error)

    return router


def _unavailable(error: FlowrollError) -> Response:
    return error_response(error, status=ShuttingDownError.status)
