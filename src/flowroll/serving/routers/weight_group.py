"""New weights from a process group: its beginning, its broadcasts and its end, as SGLang has them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.service import EngineService
from flowroll.engine.weights.staged import tensor_head
from flowroll.serving.errors import WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_control, read_body
from flowroll.serving.paths import check_host
from flowroll.serving.state import AppState
from flowroll.wire.control import ErrorBody
from flowroll.wire.group import DEFAULT_GROUP, DestroyGroupRequest, InitGroupRequest, UpdateFromGroupRequest
from flowroll.wire.names import DESTROY_GROUP_ROUTE, INIT_GROUP_ROUTE, UPDATE_FROM_GROUP_ROUTE
from flowroll.wire.safetensors import TensorHead
from flowroll.wire.schema import parse, parse_json_body
from flowroll.wire.validation import shown
from flowroll.wire.vllm import InitInfo
from flowroll.wire.weight_updates import DoneObject, SharedUpdateObject

_RESPONSES = {**WEIGHTS_RESPONSES, 404: {"model": ErrorBody, "description": "No such group"}}
FOREIGN_HOST: dict[int | str, dict[str, object]] = {
    403: {"model": ErrorBody, "description": "The address is another machine's, and none of --weight-group-host"},
}


def build_router(state: AppState) -> APIRouter:
    """Returns the routes about process groups."""
    router = APIRouter(tags=["weights"])
    engine = state.engine

    @router.post(
        INIT_GROUP_ROUTE,
        summary="Join a trainer's process group",
        description="Whatever the engine's layout, the server is one member, of rank `rank_offset`. Waits for the others, at "
        "most for --rank-timeout-s. A group of the same name is destroyed first, also one that is only joining: its trainer "
        "has begun again. Groups that have failed are forgotten.",
        responses=_RESPONSES | FOREIGN_HOST,
        openapi_extra=request_body(InitGroupRequest),
    )
    async def init_group(request: Request) -> DoneObject:
        accepted = await accept_control(request, state, InitGroupRequest)
        await join_group(state, accepted.group_name, accepted)
        return DoneObject(message=f"rank {accepted.rank_offset} of {accepted.world_size} in {accepted.group_name}")

    @router.post(
        UPDATE_FROM_GROUP_ROUTE,
        summary="Take new weights from a process group",
        description="A bucket: rank 0 broadcasts these tensors in this order. It is put in place, all of it or nothing, before "
        "it is answered. Where it is part of a module, no sample starts until the rest has come or was not heard of for "
        "--weights-idle-s. With `update_id` it is part of an update that is all or nothing. With `sha256` what arrives is "
        "compared (`verified`); without it, bytes that are missing or too many are an error, and those of another dtype of the "
        "same size are not noticed. After an error the group receives nothing more.",
        responses=_RESPONSES,
        openapi_extra=request_body(UpdateFromGroupRequest),
    )
    async def update_from_group(request: Request) -> SharedUpdateObject:
        body = await read_body(request, state)
        # On threads: a large model has thousands of tensors.
        sent = await run_in_threadpool(parse_json_body, body)
        return await take_from_group(state, sent)

    @router.post(
        DESTROY_GROUP_ROUTE,
        summary="Leave a process group",
        description="A broadcast that is under way ends with an error.",
        responses=_RESPONSES,
        openapi_extra=request_body(DestroyGroupRequest),
    )
    async def destroy_group(request: Request) -> DoneObject:
        accepted = await accept_control(request, state, DestroyGroupRequest)
        await engine.call(EngineService.leave_group, accepted.group_name)
        return DoneObject(message=f"{accepted.group_name} is destroyed")

    return router


async def join_group(state: AppState, name: str, place: InitGroupRequest | InitInfo, parent: str = "") -> None:
    """Joins a trainer's process group.

    Args:
        state: The state of the app.
        name: The name of the group.
        place: Where the group is.
        parent: What stands before the names of the fields of `place`.

    Raises:
        ForbiddenError: The address is another machine's, to which the server is not to connect.
        FlowrollError: The group cannot be joined.
    """
    check_host(place.master_address, state.config.weight_group_hosts, f"{parent}master_address")
    await state.engine.call(
        EngineService.join_group,
        name,
        rank=place.rank_offset,
        world_size=place.world_size,
        backend=place.backend,
        address=place.master_address,
        port=place.master_port,
        timeout_s=state.config.rank_timeout_s,
    )


async def take_from_group(state: AppState, sent: dict[str, Any], packed_bytes: int | None = None) -> SharedUpdateObject:
    """Receives the bucket that a body of POST /update_weights_from_distributed announces.

    Args:
        state: The server's.
        sent: The body.
        packed_bytes: The size of vLLM's packed tensors, see `receive_from_group`; None: nothing is packed.

    Raises:
        NotFoundError: There is no such group, or no such update.
        InvalidRequestError: The body breaks a rule; the group is then closed.
        WeightsRejectedError: The tensors are not the module's, or did not come.
    """
    engine = state.engine
    name = sent.get("group_name", DEFAULT_GROUP)
    name = name if isinstance(name, str) else shown(name)
    group_id = await engine.call(EngineService.find_group, name)
    try:
        accepted, heads = await run_in_threadpool(_described, sent)
        sha256 = accepted.sha256
        form: dict[str, Any] = {"flattened": accepted.load_format is not None, "packed_bytes": packed_bytes, "sha256": sha256}
        taken = await state.take_bucket(
            accepted,
            accepted.names,
            lambda update_id: engine.call(EngineService.fill_from_group, update_id, name, group_id, heads, **form),
        )
        return dataclasses.replace(taken, verified=sha256 is not None)
    except BaseException:
        # The trainer sends them all the same, and nobody receives them.
        await asyncio.shield(engine.call(EngineService.fail_group, name, group_id))
        raise


def _described(sent: dict[str, Any]) -> tuple[UpdateFromGroupRequest, list[TensorHead]]:
    """Returns the request and the tensors that it announces."""
    accepted = parse(UpdateFromGroupRequest, sent)
    described = zip(accepted.names, accepted.dtypes, accepted.shapes, strict=True)
    heads = [tensor_head(name, getattr(torch, dtype.removeprefix("torch.")), shape) for name, dtype, shape in described]
    return accepted, heads
