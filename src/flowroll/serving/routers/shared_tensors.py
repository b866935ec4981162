"""Pushes of SGLang's trainers: POST /update_weights_from_tensor and /update_weights_from_tensor_checker.

The first takes pickled handles of tensors in shared memory or on GPUs; the second compares what is in memory with what was
sent.
"""

from __future__ import annotations

import binascii
import dataclasses

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from flowroll.engine.service import EngineService
from flowroll.errors import ForbiddenError, InvalidRequestError, MalformedRequestError
from flowroll.serving.errors import WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import read_body
from flowroll.serving.state import AppState
from flowroll.wire.control import ErrorBody
from flowroll.wire.names import CHECK_UPDATE_ROUTE, UPDATE_FROM_TENSOR_ROUTE
from flowroll.wire.pickled import FIELD
from flowroll.wire.schema import parse, parse_json_body
from flowroll.wire.weight_updates import CheckedUpdateObject, CheckUpdateRequest, SharedUpdateObject, UpdateFromTensorRequest

# Handles, not data: a thousand tensors take half a megabyte a rank.
_MAX_BODY = 64 * 2**20
_MOST_SHOWN = 5


def build_router(state: AppState) -> APIRouter:
    """Returns the routes for tensors that are not in the body."""
    router = APIRouter(tags=["weights"])
    engine = state.engine

    @router.post(
        UPDATE_FROM_TENSOR_ROUTE,
        summary="Take new weights from shared memory or a GPU",
        description="A bucket, as SGLang's trainers send it. It is put in place, all of it or nothing, before it is answered. "
        "Where it is part of a module, no sample starts until the rest has come or was not heard of for --weights-idle-s. With "
        "`update_id` it is part of an update that is all or nothing. Of `serialized_named_tensors` one entry is read; of the "
        "others, segments of shared memory are released, GPU memory is not. On an error everything is as it was.",
        responses={
            **WEIGHTS_RESPONSES,
            403: {"model": ErrorBody, "description": "Not started with --allow-pickle-weights, or no tensors in the pickle"},
            404: {"model": ErrorBody, "description": "The update has ended, or there never was one"},
            409: {"model": ErrorBody, "description": "An update that was begun by name is under way"},
        },
        openapi_extra=request_body(UpdateFromTensorRequest),
    )
    async def update_weights_from_tensor(request: Request) -> SharedUpdateObject:
        if not state.config.allow_pickle_weights:
            raise ForbiddenError(
                "the server must be started with leave to read pickled tensors, got none; start it with "
                "--allow-pickle-weights, or send safetensors."
            )
        body = await read_body(request, state, _MAX_BODY)
        accepted, payload, unread = await run_in_threadpool(_decode, body, engine.facts.gpu_uuid)
        flattened = accepted.load_format is not None
        module = accepted.chosen_module
        sent = await engine.call(EngineService.open_sent, payload, module=module, flattened=flattened, unread=unread)
        try:
            if accepted.weight_update_mode is not None:
                return await state.take_lora_bucket(accepted, sent.names, sent.sent_id)
            return await state.take_bucket(
                accepted,
                sent.names,
                lambda update_id: engine.call(EngineService.fill_from_sent, update_id, sent.sent_id),
            )
        finally:
            # Of a bucket that nobody wanted, too.
            engine.call(EngineService.close_sent, sent.sent_id)

    @router.post(
        CHECK_UPDATE_ROUTE,
        summary="Compare some weights with what they should be",
        description="As SGLang's trainers ask it after a push. Computed between steps, and kept until the weights change.",
        response_model=CheckedUpdateObject,
        responses={
            **WEIGHTS_RESPONSES,
            400: {
                "model": CheckedUpdateObject | ErrorBody,
                "description": "Tensors differ, or the module does not have them; or the body is not JSON",
            },
        },
        openapi_extra=request_body(CheckUpdateRequest),
    )
    async def check_update(request: Request) -> Response:
        body = await read_body(request, state)
        accepted = await run_in_threadpool(lambda: parse(CheckUpdateRequest, parse_json_body(body)))
        module, expected = accepted.target_module, accepted.expected_named_tensors_sha256
        missing, different = await engine.call(EngineService.differing_weights, expected, module)
        success = not (missing or different)
        message = f"Verified module '{module}' update for {len(expected)} tensor(s)."
        if not success:
            parts = ((missing, "missing {} tensor(s): {}"), (different, "checksum mismatch for {} tensor(s): {}"))
            found = "; ".join(text.format(len(names), _listed(names)) for names, text in parts if names)
            message = f"Module '{module}' update weight check failed: {found}"
        checked = CheckedUpdateObject(success=success, message=message)
        return JSONResponse(dataclasses.asdict(checked), status_code=200 if success else 400)

    return router


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_SHOWN
    return ", ".join(name[:200] for name in names[:_MOST_SHOWN]) + (f", ... (+{rest} more)" if rest > 0 else "")


def _decode(body: bytearray, gpu_uuid: str | None) -> tuple[UpdateFromTensorRequest, bytes, list[bytes]]:
    """Returns the request, the entry that is read, and the others."""
    accepted = parse(UpdateFromTensorRequest, parse_json_body(body))
    own = _own_entry(accepted.payload_gpu_uuids, gpu_uuid)
    try:
        entries = [binascii.a2b_base64(entry, strict_mode=True) for entry in accepted.serialized_named_tensors]
    except ValueError as error:
        raise MalformedRequestError(f"{FIELD} must be base64, got {error}; encode it again.", field=FIELD) from error
    return accepted, entries.pop(own), entries


def _own_entry(uuids: list[str] | None, gpu_uuid: str | None) -> int:
    """Chooses the entry to read: all hold the whole bucket, but one on this GPU needs no other to be in reach."""
    if uuids is None or gpu_uuid is None:
        return 0
    own = _plain_uuid(gpu_uuid)
    known = [_plain_uuid(uuid) for uuid in uuids]
    if own not in known:
        raise InvalidRequestError(
            f"payload_gpu_uuids must hold the server's GPU, which is {own}, got {', '.join(known[:8])}; start the server on a "
            "GPU of the trainer's, or leave it out.",
            field="payload_gpu_uuids",
        )
    return known.index(own)


def _plain_uuid(uuid: str) -> str:
    # NVML's prefixes are not in torch's.
    return uuid.removeprefix("MIG-").removeprefix("GPU-").lower()
