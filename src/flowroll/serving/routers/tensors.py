"""New weights as safetensors bodies: POST /weights/begin, /weights/{update_id}/..., and all at once."""

from __future__ import annotations

from fastapi import APIRouter, Request

from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.service import UpdateProgress
from flowroll.serving.errors import WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body, safetensors_body
from flowroll.serving.parsing import accept_control
from flowroll.serving.state import AppState
from flowroll.serving.uploads import read_bucket
from flowroll.serving.weight_uploads import WeightUpload
from flowroll.wire.control import ErrorBody
from flowroll.wire.names import ABANDON_ROUTE, BEGIN_ROUTE, BUCKETS_ROUTE, COMMIT_ROUTE, UPDATE_FROM_BODY_ROUTE
from flowroll.wire.schema import parse
from flowroll.wire.weight_updates import (
    AbandonedObject,
    ArrivedObject,
    BeginUpdateRequest,
    BegunObject,
    BodyUpdateRequest,
    CommitUpdateRequest,
)
from flowroll.wire.weights import UpdateObject

_RESPONSES = {
    **WEIGHTS_RESPONSES,
    404: {"model": ErrorBody, "description": "The update has ended, or there never was one"},
    409: {"model": ErrorBody, "description": "Another update is under way, or the commit of this one"},
}


def build_router(state: AppState) -> APIRouter:
    """Returns the routes that take tensors."""
    router = APIRouter(tags=["weights"])
    uploads, config = state.uploads, state.config

    @router.post(
        BEGIN_ROUTE,
        summary="Begin an update whose tensors come in buckets",
        description="One at a time. Nothing changes before the commit; an update that is silent for `idle_s` is dropped.",
        responses=_RESPONSES,
        openapi_extra=request_body(BeginUpdateRequest),
    )
    async def begin(request: Request) -> BegunObject:
        accepted = await accept_control(request, state, BeginUpdateRequest, is_optional=True)
        opened = (await uploads.begin(accepted.module, accepted.weight_version, partial=accepted.partial)).opened
        return BegunObject(
            update_id=opened.update_id,
            module=opened.module,
            num_tensors=len(opened.names),
            num_bytes=opened.num_bytes,
            max_body_bytes=config.max_weights_body_bytes,
            idle_s=uploads.idle_s,
        )

    @router.post(
        BUCKETS_ROUTE,
        summary="Send a bucket of tensors",
        description="A safetensors file. Names, shapes and dtypes are checked before the data is read. A bucket that is "
        "refused, or breaks off, is dropped; the update goes on, and its tensors may come again.",
        responses=_RESPONSES,
        openapi_extra=safetensors_body(),
    )
    async def put_bucket(update_id: str, request: Request) -> ArrivedObject:
        upload = uploads.get(update_id)
        progress = await _read(request, upload)
        return ArrivedObject(
            update_id=update_id,
            module=upload.opened.module,
            num_arrived=progress.num_arrived,
            num_tensors=progress.num_tensors,
        )

    @router.post(
        COMMIT_ROUTE,
        summary="Put the tensors that arrived in place",
        description="All or nothing, between two requests. If tensors are missing, the update goes on and they may still come; "
        "otherwise it has ended, whatever comes of it.",
        responses=_RESPONSES,
        openapi_extra=request_body(CommitUpdateRequest),
    )
    async def commit(update_id: str, request: Request) -> UpdateObject:
        accepted = await accept_control(request, state, CommitUpdateRequest, is_optional=True)
        return await _commit(uploads.get(update_id), accepted.mode)

    @router.post(
        ABANDON_ROUTE, summary="Drop an update", description="Weights, version and checksum stay.", responses=_RESPONSES
    )
    async def abandon(update_id: str) -> AbandonedObject:
        uploads.abandon(update_id)
        return AbandonedObject(update_id=update_id)

    @router.post(
        UPDATE_FROM_BODY_ROUTE,
        summary="Take new weights from one body",
        description="A whole module as one safetensors file; `module`, `weight_version` and `mode` are in the query. All or "
        "nothing.",
        responses=_RESPONSES,
        openapi_extra=safetensors_body(BodyUpdateRequest),
    )
    async def update_from_body(request: Request) -> UpdateObject:
        accepted = parse(BodyUpdateRequest, dict(request.query_params))
        upload = await uploads.begin(accepted.module, accepted.weight_version)
        try:
            await _read(request, upload)
            return await _commit(upload, accepted.mode)
        finally:
            uploads.end(upload)

    async def _read(request: Request, upload: WeightUpload) -> UpdateProgress:
        return await read_bucket(request, state.engine, upload, max_bytes=config.max_weights_body_bytes, idle_s=uploads.idle_s)

    async def _commit(upload: WeightUpload, mode: ExclusiveMode) -> UpdateObject:
        return UpdateObject.of(await state.commit_upload(upload, mode))

    return router
