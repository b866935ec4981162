"""POST /update_weights_from_disk, /get_weights_checksum and /verify_weights."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.service import EngineService
from flowroll.engine.weights.staged import WeightFiles, find_weights
from flowroll.errors import MalformedRequestError
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import DISK_RESPONSES, WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_control, read_body
from flowroll.serving.paths import allowed_path, check_inside
from flowroll.serving.state import AppState
from flowroll.wire.names import CHECKSUM_ROUTE, UPDATE_FROM_DISK_ROUTE, VERIFY_ROUTE
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
    """Returns the routes about weights."""
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
