"""GET /server_info and /metrics: what runs here, and how."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Response
from msgspec import Meta
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from flowroll.engine import BatchLimits
from flowroll.engine.config import EngineInfo
from flowroll.engine.scheduler import RequestCounts
from flowroll.serving.errors import COMMON_RESPONSES
from flowroll.serving.state import AppState
from flowroll.wire.codec import WireFormat
from flowroll.wire.messages import Dialect


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo(EngineInfo):
    """What runs here, and how. Every "auto" of the start is a value.

    Attributes:
        weight_version: The version of the weights in memory.
        version_number: Its number in the sequence of all versions, counted from 0.
        wire_format: Answer to Accept: */*.
        wire_dialect: Names in the answer where the request does not choose.
        batching: How much runs at once.
        max_queue: Requests that may wait.
        max_body_bytes: Size of a request body, without the tensors in it.
        max_score_body_bytes: Size of a body of POST /rollout/score, /rollout/generate and /generate, with its tensors.
        max_weights_body_bytes: Size of a body with tensors of new weights.
        receive_timeout_s: Seconds for headers to come, and a body (and a second per 64 KiB of it).
        world_size: How many members of a trainer's process group it is: 1, or one for each replica of a fleet.
        is_paused: Whether new requests are refused until /continue_generation.
        is_asleep: Whether the memory of the weights is released.
        is_ready: Whether new requests are taken.
        queue: The counters of requests: accepted = completed + failed + pending + running.
        uptime_s: Seconds since the start.
    """

    family: Annotated[str, Meta(examples=["qwen_image"])]
    variant: Annotated[str, Meta(examples=["base"])]
    pipeline: Annotated[str, Meta(examples=["QwenImagePipeline"])]
    dtype: Annotated[str, Meta(examples=["bfloat16"])]
    device: Annotated[str, Meta(examples=["cuda:0"])]
    weight_version: Annotated[str, Meta(examples=["0"])]
    version_number: int
    compiled: str | None
    wire_format: WireFormat
    wire_dialect: Dialect
    batching: BatchLimits
    max_queue: int
    max_body_bytes: int
    max_score_body_bytes: int
    max_weights_body_bytes: int
    receive_timeout_s: float
    world_size: int
    is_paused: bool
    is_asleep: bool
    is_ready: bool
    queue: RequestCounts
    uptime_s: float


def build_router(state: AppState) -> APIRouter:
    """Returns the routes about what runs here."""
    router = APIRouter(tags=["status"])
    facts, config = state.engine.facts, state.config

    @router.get("/server_info", summary="What runs here, and how", responses=COMMON_RESPONSES)
    async def server_info() -> ServerInfo:
        status = await state.status()
        load = status.load
        return ServerInfo(
            **{field.name: getattr(facts.info, field.name) for field in dataclasses.fields(facts.info)},
            weight_version=status.weight_version,
            version_number=status.version_number,
            wire_format=config.wire_format,
            wire_dialect=config.wire_dialect,
            batching=facts.batching,
            max_queue=config.max_queue,
            max_body_bytes=config.max_body_bytes,
            max_score_body_bytes=config.max_score_body_bytes,
            max_weights_body_bytes=config.max_weights_body_bytes,
            receive_timeout_s=config.receive_timeout_s,
            world_size=status.world_size,
            is_paused=load.is_paused,
            is_asleep=status.is_asleep,
            is_ready=status.is_accepting and not (load.is_paused or status.is_asleep),
            queue=load.requests,
            uptime_s=time.monotonic() - state.started_s,
        )

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=COMMON_RESPONSES)
    async def metrics() -> Response:
        return Response(state.metrics.render(await state.status()), media_type=CONTENT_TYPE_LATEST)

    return router
