"""POST /update_weights_from_disk, /get_weights_checksum, /verify_weights, and the release of the weights' memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.service import CallFuture, EngineService
from flowroll.engine.weights.staged import WeightFiles, find_weights
from flowroll.errors import MalformedRequestError
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import DISK_RESPONSES, WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_control, read_body
from flowroll.serving.paths import allowed_path, check_inside
from flowroll.serving.state import CHANGES, AppState
from flowroll.types import MemoryChange
from flowroll.wire.control import MemoryObject, ReleaseRequest, ResumeRequest
from flowroll.wire.names import CHECKSUM_ROUTE, RELEASE_ROUTE, RESUME_ROUTE, UPDATE_FROM_DISK_ROUTE, VERIFY_ROUTE
from flowroll.wire.schema import parse, parse_json_body
from flowroll.wire.weights import (
    ChecksumRequest,
    ChecksumsObject,
    UpdateFromDiskRequest,
    UpdateObject,
    VerifiedObject,
    VerifyRequest,
)


def build_router(state: AppState) -> APIRouter:
    """Returns the routes about weights and their memory."""
    router = APIRouter(tags=["weights"])
    engine = state.engine

    @router.post(
        UPDATE_FROM_DISK_ROUTE,
        summary="Take new weights from disk",
        description="All or nothing: read and checked while requests run, exchanged between two of them. On any error weights, "
        "version and checksum are as they were.",
        responses=DISK_RESPONSES,
        openapi_extra=request_body(UpdateFromDiskRequest),
    )
    async def update_weights_from_disk(request: Request) -> UpdateObject:
        accepted = await accept_control(request, state, UpdateFromDiskRequest)
        files = await run_in_threadpool(_find, accepted, state.config)
        version, mode = accepted.weight_version, accepted.mode
        update = await state.update_weights(lambda: engine.call(EngineService.update_from_disk, files, version, mode))
        return UpdateObject.of(update)

    @router.post(
        CHECKSUM_ROUTE,
        summary="Checksum the weights",
        description="sha256 over a module's tensors in the order of their names: of each its name, then its raw bytes. "
        "Computed between steps, and kept until the weights change.",
        response_model_exclude_none=True,
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(ChecksumRequest),
    )
    async def get_weights_checksum(request: Request) -> ChecksumsObject:
        accepted = await accept_control(request, state, ChecksumRequest)
        names = list(dict.fromkeys(accepted.module_names or engine.facts.modules))
        return ChecksumsObject(**await engine.call(EngineService.checksums, names))

    @router.post(
        VERIFY_ROUTE,
        summary="Compare the weights with what they should be",
        description="409 with the names of tensors that differ, are missing, unknown or named twice. Computed between "
        "steps, and kept until the weights change.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(VerifyRequest),
    )
    async def verify_weights(request: Request) -> VerifiedObject:
        body = await read_body(request, state)
        accepted, expected = await run_in_threadpool(_read_expected, body)
        module = accepted.module

        count, version = await engine.call(EngineService.verify_weights, expected, module)
        return VerifiedObject(
            message=f"{count} tensors are as expected", module=module, weight_version=version, num_tensors=count
        )

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
        description="Weights, version, adapters and checksums are as they were. After `discard`, the server answers as in "
        "sleep until an update has brought all weights of the transformer.",
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


def _find(accepted: UpdateFromDiskRequest, config: ServerConfig) -> WeightFiles:
    """Returns the files that are to be read; all of them lie where the client may have them read."""
    path = allowed_path(accepted.model_path, config.weights_roots)
    files = find_weights(path, accepted.chosen_module, named=accepted.model_path)
    check_inside([*files.files, *([files.config] if files.config else [])], config.weights_roots)
    return files


def _read_expected(body: bytearray) -> tuple[VerifyRequest, list[tuple[str, str]]]:
    """Returns the request, and what it expects with names that are there twice, of which a parser keeps the last in silence."""
    accepted = parse(VerifyRequest, parse_json_body(body))

    class Pairs(dict[str, Any]):
        """An object that remembers all that was in it."""

        def __init__(self, pairs: list[tuple[str, Any]]) -> None:
            super().__init__(pairs)
            self.pairs = pairs

    try:
        return accepted, json.loads(body, object_pairs_hook=Pairs)["expected"].pairs
    except (ValueError, RecursionError) as error:
        # A value that another of the same name replaced, which the first parser did not mind.
        raise MalformedRequestError(
            "body must be plain JSON, got a value that is too deep or too long; send each name once."
        ) from error
