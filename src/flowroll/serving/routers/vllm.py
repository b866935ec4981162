"""vLLM's routes for reinforcement learning, by our own means: pauses, and weights from a process group."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, Request

from flowroll.engine.scheduler import PauseMode
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError, NotFoundError
from flowroll.serving.errors import COMMON_RESPONSES, CONTROL_RESPONSES, WEIGHTS_RESPONSES
from flowroll.serving.openapi import query_parameters, request_body
from flowroll.serving.parsing import accept_control, read_body
from flowroll.serving.routers.weight_group import FOREIGN_HOST, join_group, take_from_group
from flowroll.serving.state import AppState
from flowroll.wire.control import ContinueRequest, ErrorBody
from flowroll.wire.schema import parse, parse_json_body
from flowroll.wire.vllm import (
    VLLM_GROUP,
    AbortedRequestsObject,
    AbortRequestsRequest,
    FinishUpdateRequest,
    InitTransferRequest,
    MessageObject,
    PausedObject,
    PauseQuery,
    StartUpdateRequest,
    StatusObject,
    UpdateWeightsRequest,
    WeightInfoObject,
    WorldObject,
    WorldQuery,
)

# How often the end of what runs is looked for, in seconds.
_LOOK_S = 0.02
_OF_GROUPS = {**WEIGHTS_RESPONSES, 404: {"model": ErrorBody, "description": "No group was joined, or no update started"}}
# What the fields of a bucket are called by vLLM.
_NAMES = {"names": "names", "dtypes": "dtype_names", "shapes": "shapes"}


def build_router(state: AppState) -> APIRouter:
    """Returns vLLM's routes."""
    router = APIRouter(tags=["vllm"])
    engine = state.engine
    # The update that was started and not yet finished, if there is one; and how the group's tensors are packed, if they are.
    started: list[str] = []
    packed: list[int] = []

    @router.post(
        "/pause",
        summary="Pause generation, as in vLLM",
        description="New requests are taken and wait until /resume. `mode` in the query says what becomes of those that wait "
        "or run: `abort` (the default) ends them in a 499, without partial results; `wait` lets what runs finish before it is "
        "answered; `keep` stops it before its next step. Weights that are finished meanwhile are those of all samples: what "
        "was stopped is then done again from its start, since no sample is of two versions.",
        responses=CONTROL_RESPONSES,
        openapi_extra=query_parameters(PauseQuery),
    )
    async def pause(request: Request) -> StatusObject:
        mode = parse(PauseQuery, dict(request.query_params)).meant
        held: PauseMode = "freeze" if mode == "keep" else "finish"
        await engine.call(EngineService.pause, held, refuses=False)
        if mode == "abort":
            await engine.call(EngineService.abort, None)
        if mode != "keep":
            load = (await state.status()).load
            while load.is_paused and load.requests.running:
                await asyncio.sleep(_LOOK_S)
                load = (await state.status()).load
        return StatusObject(status="paused")

    @router.post(
        "/resume",
        summary="Go on with generation, as in vLLM",
        responses=CONTROL_RESPONSES,
        openapi_extra=request_body(ContinueRequest),
    )
    async def resume(request: Request) -> StatusObject:
        await accept_control(request, state, ContinueRequest, is_optional=True)
        await engine.call(EngineService.resume)
        return StatusObject(status="resumed")

    @router.get("/is_paused", summary="Whether generation is paused, as in vLLM", responses=COMMON_RESPONSES)
    async def is_paused() -> PausedObject:
        return PausedObject(is_paused=(await state.status()).load.is_paused)

    @router.post(
        "/abort_requests",
        summary="End requests that wait or run, as in vLLM",
        responses=CONTROL_RESPONSES,
        openapi_extra=request_body(AbortRequestsRequest),
    )
    async def abort_requests(request: Request) -> AbortedRequestsObject:
        accepted = await accept_control(request, state, AbortRequestsRequest)
        named = [engine.call(EngineService.abort, one) for one in accepted.request_ids or (None,)]
        return AbortedRequestsObject(aborted=sum([await one for one in named]))

    @router.get("/weight_info", summary="The version of the weights, as in vLLM", responses=COMMON_RESPONSES)
    async def weight_info() -> WeightInfoObject:
        return WeightInfoObject(weight_version=(await state.status()).weight_version)

    @router.get(
        "/get_world_size",
        summary="How many members of a process group this server is, as in vLLM",
        responses=COMMON_RESPONSES,
        openapi_extra=query_parameters(WorldQuery),
    )
    async def get_world_size(request: Request) -> WorldObject:
        parse(WorldQuery, dict(request.query_params))
        return WorldObject(world_size=(await state.status()).world_size)

    @router.post(
        "/init_weight_transfer_engine",
        summary="Join a trainer's process group, as in vLLM",
        description="A group of torch.distributed, as /init_weights_update_group joins it, under one name of its own. vLLM's "
        "own NCCL trainer makes another kind of communicator, which is not joined.",
        responses=WEIGHTS_RESPONSES | FOREIGN_HOST,
        openapi_extra=request_body(InitTransferRequest),
    )
    async def init_weight_transfer_engine(request: Request) -> MessageObject:
        info = (await accept_control(request, state, InitTransferRequest)).init_info
        await join_group(state, VLLM_GROUP, info, "init_info.")
        packed[:] = [info.packed_buffer_size_bytes] if info.packed else []
        return MessageObject(message="Weight transfer initialized")

    @router.post(
        "/shutdown_weight_transfer_engine",
        summary="Leave the trainer's process group, as in vLLM",
        description="Without a group there is nothing to do, and it is no error.",
        responses=WEIGHTS_RESPONSES,
    )
    async def shutdown_weight_transfer_engine() -> MessageObject:
        packed.clear()
        with contextlib.suppress(NotFoundError):
            await engine.call(EngineService.leave_group, VLLM_GROUP)
        return MessageObject(message="Weight transfer shut down")

    @router.post(
        "/start_weight_update",
        summary="Begin an update of the transformer, as in vLLM",
        description="One at a time, as /weights/begin. Nothing changes before /finish_weight_update, and what does not arrive "
        "stays as it is. An update that is silent for --weights-idle-s is dropped.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(StartUpdateRequest),
    )
    async def start_weight_update(request: Request) -> MessageObject:
        await accept_control(request, state, StartUpdateRequest, is_optional=True)
        upload = await state.uploads.begin("transformer", None, partial=True)
        started[:] = [upload.update_id]
        return MessageObject(message="Weight update started")

    @router.post(
        "/update_weights",
        summary="Take tensors from the process group, as in vLLM",
        description="Rank 0 broadcasts these tensors in this order, one by one or packed. They are part of the update that was "
        "started; without one they are put in place at once, as by /update_weights_from_distributed (vLLM before 0.19 had no "
        "start).",
        responses=_OF_GROUPS,
        openapi_extra=request_body(UpdateWeightsRequest),
    )
    async def update_weights(request: Request) -> MessageObject:
        info = parse(UpdateWeightsRequest, parse_json_body(await read_body(request, state))).update_info
        sent: dict[str, Any] = {
            "names": info.names,
            "dtypes": info.dtype_names,
            "shapes": info.shapes,
            "group_name": VLLM_GROUP,
        }
        if started:
            sent["update_id"] = started[0]
        sizes = [info.packed_buffer_size_bytes] if info.packed else packed
        try:
            await take_from_group(state, sent, sizes[0] if sizes else None)
        except InvalidRequestError as error:
            if error.field in _NAMES:
                raise error.renamed(f"update_info.{_NAMES[error.field]}") from None
            raise
        except NotFoundError as error:
            if error.field == "update_id":
                started.clear()
            raise
        return MessageObject(message="Weights updated")

    @router.post(
        "/finish_weight_update",
        summary="Put the tensors of the update in place, as in vLLM",
        description="All or nothing, between two requests. Without a tensor it is a 422, and the update goes on.",
        responses=_OF_GROUPS,
        openapi_extra=request_body(FinishUpdateRequest),
    )
    async def finish_weight_update(request: Request) -> MessageObject:
        accepted = await accept_control(request, state, FinishUpdateRequest, is_optional=True)
        if not started:
            raise NotFoundError("a weight update must be started to be finished, got none; call /start_weight_update first.")
        try:
            upload = state.uploads.get(started[0])
        except NotFoundError:
            started.clear()
            raise
        upload.weight_version = accepted.weight_version
        # What is stopped between two steps would never end.
        is_paused = (await state.status()).load.is_paused
        await state.commit_upload(upload, "abort" if is_paused else "drain")
        started.clear()
        return MessageObject(message="Weight update finished")

    return router
