"""GET /server_info: what runs here, and how."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from fastapi import APIRouter
from pydantic import BaseModel, Field

from flowroll.engine import AdapterLimits, BatchLimits, Limits
from flowroll.families import Defaults
from flowroll.serving.errors import COMMON_RESPONSES
from flowroll.serving.state import AppState
from flowroll.types import Layout
from flowroll.wire.codec import WireFormat
from flowroll.wire.dialects import Dialect


class Queue(BaseModel):
    """The worker's counters: accepted = completed + failed + pending + running."""

    accepted: int
    completed: int
    failed: int
    pending: int
    running: int


class ServerInfo(BaseModel):
    """What runs here, and how. Every "auto" of the start is a value."""

    model: str = Field(description="The checkpoint folder.")
    family: str = Field(examples=["qwen_image"])
    variant: str = Field(examples=["base"])
    pipeline: str = Field(description="The diffusers pipeline class.", examples=["QwenImagePipeline"])
    dtype: str = Field(examples=["bfloat16"])
    device: str = Field(examples=["cuda:0"])
    parameters: int = Field(description="Of the transformer.")
    layout: Layout = Field(description="How the transformer is spread over ranks.")
    transformer_bytes: int = Field(description="Of its weights, on each rank.")
    weight_version: str = Field(description="Of the weights in memory.", examples=["0"])
    limits: Limits = Field(description="What one request may ask for.")
    adapter_limits: AdapterLimits = Field(description="How many LoRA adapters there may be.")
    defaults: Defaults = Field(description="What a request leaves open.")
    pixel_unit: int = Field(description="Height and width must be multiples of this.")
    versions: Mapping[str, str] = Field(description="Of the libraries whose code shapes the bits.")
    wire_format: WireFormat = Field(description="Answer to Accept: */*.")
    wire_dialect: Dialect = Field(description="Names in the answer where the request does not choose.")
    batching: BatchLimits = Field(description="How much runs at once.")
    max_queue: int = Field(description="Requests that may wait.")
    max_body_bytes: int = Field(description="Size of a request body.")
    max_score_body_bytes: int = Field(description="Size of a body of POST /rollout/score.")
    max_weights_body_bytes: int = Field(description="Size of a body with tensors of new weights.")
    receive_timeout_s: float = Field(description="Seconds for headers to come, and a body (and a second per 64 KiB of it).")
    is_paused: bool = Field(description="Whether new requests are refused until /continue_generation.")
    is_asleep: bool = Field(description="Whether the memory of the weights is released.")
    is_ready: bool = Field(description="Whether new requests are taken.")
    queue: Queue
    uptime_s: float


def build_router(state: AppState) -> APIRouter:
    """The info route."""
    router = APIRouter(tags=["status"])
    info, config = state.worker.engine.info, state.config

    @router.get("/server_info", summary="What runs here, and how", responses=COMMON_RESPONSES)
    async def server_info() -> ServerInfo:
        load = state.worker.load()
        return ServerInfo(
            **{field.name: getattr(info, field.name) for field in dataclasses.fields(info)},
            weight_version=state.worker.engine.weight_version,
            wire_format=config.wire_format,
            wire_dialect=config.wire_dialect,
            batching=state.worker.engine.scheduler.limits,
            max_queue=config.max_queue,
            max_body_bytes=config.max_body_bytes,
            max_score_body_bytes=config.max_score_body_bytes,
            max_weights_body_bytes=config.max_weights_body_bytes,
            receive_timeout_s=config.receive_timeout_s,
            is_paused=load.is_paused,
            is_asleep=state.worker.engine.is_asleep,
            is_ready=state.worker.is_accepting and not (load.is_paused or state.worker.engine.is_asleep),
            queue=Queue(**dataclasses.asdict(load.requests)),
            uptime_s=time.monotonic() - state.started_s,
        )

    return router
