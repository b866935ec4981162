"""The FastAPI app of one server. It has no state but what it is given."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from flowroll import __version__
from flowroll.engine.service import EngineClient, EngineService
from flowroll.errors import FlowrollError
from flowroll.heap import trim_heap
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import install_error_handlers
from flowroll.serving.middleware import RequestMiddleware
from flowroll.serving.openapi import DESCRIPTION, TAGS, install_openapi
from flowroll.serving.origins import OriginGuard
from flowroll.serving.routers import (
    adapters,
    control,
    docs,
    generate,
    health,
    openai,
    rollout,
    shared_tensors,
    status,
    tensors,
    vllm,
    weight_group,
    weights,
)
from flowroll.serving.state import AppState
from flowroll.serving.tracing import Tracing, current_tracing

# The pages' own routes ask for the API key, in a way that a browser has an answer to.
_VIEWER = "/viewer"
_TRIM_EVERY_S = 10.0


def create_app(engine: EngineClient, config: ServerConfig, *, tracing: Tracing | None = None) -> FastAPI:
    """Returns the HTTP interface of an engine.

    Args:
        engine: Runs the requests. Who made it closes it, after the app's last request.
        config: How to answer; its address is not used here.
        tracing: Makes spans of requests; None: spans go to the process's own provider, if it has one.
    """
    state = AppState.build(engine, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        trimming = asyncio.create_task(_trim_now_and_then())
        yield
        trimming.cancel()
        with contextlib.suppress(FlowrollError):
            await engine.call(EngineService.leave_groups)

    app = FastAPI(
        lifespan=lifespan,
        title="flowroll",
        version=__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        # Their pages load scripts from elsewhere; `routers/docs.py` has ours.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Newer versions make spans and records of their own, with the messages of exceptions; ours say what there is to say.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for group in (
        rollout,
        generate,
        openai,
        control,
        weights,
        tensors,
        shared_tensors,
        weight_group,
        vllm,
        adapters,
        health,
        status,
        docs,
    ):
        app.include_router(group.build_router(state))
    if config.viewer is not None:
        # Its libraries are loaded for those who look alone.
        from flowroll.serving.routers import viewer

        app.include_router(viewer.build_router(state, config.viewer, _VIEWER))
    install_error_handlers(app)
    install_openapi(app, needs_token=config.api_key is not None)
    app.add_middleware(
        RequestMiddleware,
        metrics=state.metrics,
        api_key=config.api_key,
        origins=OriginGuard(config),
        exactness=engine.facts.info.exactness,
        keyed_elsewhere=None if config.viewer is None else _VIEWER,
        tracing=tracing or current_tracing(),
    )
    # What is answered without the app, by its connection, is counted too.
    app.state.metrics = state.metrics
    return app


async def _trim_now_and_then() -> None:
    """Returns what answers have left in the heap; it takes a millisecond, on the thread that would use that memory."""
    while True:
        await asyncio.sleep(_TRIM_EVERY_S)
        trim_heap()
