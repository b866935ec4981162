"""Is it alive, does it take requests, can it generate. All of these answer while a generation runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, Response

from flowroll.engine.service import Evidence
from flowroll.errors import AsleepError, EngineError, FlowrollError, PausedError, ShuttingDownError
from flowroll.serving.errors import COMMON_RESPONSES, error_response
from flowroll.serving.state import AppState
from flowroll.wire.control import ErrorBody


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The check passed.

    Attributes:
        status: Always "ok".
    """

    status: Literal["ok"] = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth(Health):
    """The engine is there.

    Attributes:
        is_asleep: Whether the memory of the weights is released.
    """

    is_asleep: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationHealth(Health):
    """The engine generates.

    Attributes:
        evidence: recent: a request ended well in the last 30 s; running: one is making progress; probe: a one-step image;
            paused: generation is paused; asleep: the memory of the weights is released.
    """

    evidence: Evidence


_FAILED: dict[int | str, dict[str, object]] = {
    **COMMON_RESPONSES,
    503: {"model": ErrorBody, "description": "The check failed"},
}


def build_router(state: AppState) -> APIRouter:
    """Returns the health routes."""
    router = APIRouter(tags=["health"])

    @router.get("/liveness", summary="The process answers", description="Open even where the server demands a token.")
    async def liveness() -> Health:
        return Health()

    @router.get("/health", summary="The engine's thread lives", response_model=EngineHealth, responses=_FAILED)
    async def health() -> EngineHealth | Response:
        try:
            status = await state.status()
        except FlowrollError as error:
            return _unavailable(error)
        if not status.is_alive:
            return _unavailable(EngineError("the engine's thread must live, got its end; restart the server."))
        return EngineHealth(is_asleep=status.is_asleep)

    @router.get("/readiness", summary="New requests are taken", response_model=Health, responses=_FAILED)
    async def readiness() -> Health | Response:
        try:
            status = await state.status()
        except FlowrollError as error:
            return _unavailable(error)
        if not status.is_accepting:
            return _unavailable(
                ShuttingDownError("the server must take requests to be ready, got a shutdown; use another replica.")
            )
        if status.is_asleep:
            then = "wake it and send all weights" if status.memory_mode == "discard" else "wake it"
            return _unavailable(AsleepError(f"the engine must be awake to be ready, got released memory; {then}."))
        if status.load.is_paused:
            return _unavailable(PausedError("generation must go on to be ready, got a pause; continue it."))
        return Health()

    @router.get("/health_generate", summary="The engine generates", response_model=GenerationHealth, responses=_FAILED)
    async def health_generate() -> GenerationHealth | Response:
        try:
            return GenerationHealth(evidence=await state.probe())
        except FlowrollError as error:
            return _unavailable(error)

    return router


def _unavailable(error: FlowrollError) -> Response:
    return error_response(error, status=ShuttingDownError.status)
