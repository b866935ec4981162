"""Pushes of SGLang's trainers: POST /update_weights_from_tensor and /update_weights_from_tensor_checker.

The first takes pickled handles of tensors in shared memory or on GPUs; the second compares what is in memory with what was
sent.
"""

from __future__ import annotations

import binascii
import contextlib
from collections.abc import Iterator

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import tensor_head
from flowroll.errors import ForbiddenError, InvalidRequestError, MalformedRequestError, WeightsRejectedError
from flowroll.serving.errors import WEIGHTS_RESPONSES, ErrorBody
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import read_body
from flowroll.serving.state import AppState
from flowroll.types import check_version
from flowroll.wire.arrivals import CheckedUpdateObject, CheckUpdateRequest, SharedUpdateObject, UpdateFromTensorRequest
from flowroll.wire.names import CHECK_UPDATE_ROUTE, UPDATE_FROM_TENSOR_ROUTE
from flowroll.wire.pickled import FIELD, SentTensors, named_tensors
from flowroll.wire.schema import parse, parse_json_body
from flowroll.wire.sent_tensors import gpu_uuid

# Handles, not data: a thousand tensors take half a megabyte a rank.
_MAX_BODY = 64 * 2**20
_MOST_SHOWN = 5


def build_router(state: AppState) -> APIRouter:
    """The routes for tensors that are not in the body."""
    router = APIRouter(tags=["weights"])
    engine = state.worker.engine

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
        accepted, sent = await run_in_threadpool(_decode, body, torch.device(engine.info.device))
        names = [name for name, _ in sent.pairs]
        try:
            if accepted.weight_update_mode is not None:
                most = state.config.adapter_limits.max_adapter_bytes
                return await state.take_lora_bucket(accepted, names, lambda: _copies(sent, most))
            return await state.take_bucket(accepted, names, lambda incoming: _copy(incoming, sent))
        finally:
            # Of a bucket that nobody wanted, too.
            sent.release()

    @router.post(
        CHECK_UPDATE_ROUTE,
        summary="Compare some weights with what they should be",
        description="As SGLang's trainers ask it after a push. Waits for the requests that run.",
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
        missing, different = await state.between_requests(lambda: engine.differing_weights(expected, module=module))
        success = not (missing or different)
        message = f"Verified module '{module}' update for {len(expected)} tensor(s)."
        if not success:
            parts = ((missing, "missing {} tensor(s): {}"), (different, "checksum mismatch for {} tensor(s): {}"))
            found = "; ".join(text.format(len(names), _listed(names)) for names, text in parts if names)
            message = f"Module '{module}' update weight check failed: {found}"
        checked = CheckedUpdateObject(success=success, message=message)
        return JSONResponse(checked.model_dump(), status_code=200 if success else 400)

    return router


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_SHOWN
    return ", ".join(name[:200] for name in names[:_MOST_SHOWN]) + (f", ... (+{rest} more)" if rest > 0 else "")


def _decode(body: bytearray, device: torch.device) -> tuple[UpdateFromTensorRequest, SentTensors]:
    accepted = parse(UpdateFromTensorRequest, parse_json_body(body))
    if accepted.weight_version is not None:
        check_version(accepted.weight_version, "weight_version")
    own = _own_entry(accepted.payload_gpu_uuids, device)
    try:
        entries = [binascii.a2b_base64(entry, strict_mode=True) for entry in accepted.serialized_named_tensors]
    except ValueError as error:
        raise MalformedRequestError(f"{FIELD} must be base64, got {error}; encode it again.", field=FIELD) from error
    data = entries.pop(own)
    flattened = accepted.load_format is not None
    return accepted, named_tensors(data, module=accepted.chosen_module, flattened=flattened, unread=entries)


def _own_entry(uuids: list[str] | None, device: torch.device) -> int:
    """Which entry to read: all hold the whole bucket, but one on this GPU needs no other to be in reach."""
    if uuids is None or device.type != "cuda":
        return 0
    own = _plain_uuid(gpu_uuid(torch.cuda.current_device() if device.index is None else device.index))
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


def _copy(incoming: WeightReceiver, sent: SentTensors) -> None:
    """Copies the data to where the engine will hold it."""
    tensors = sent.pairs
    with _released_after(sent):
        if tensors:
            heads = [tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
            with incoming.bucket(heads, device=tensors[0][1].device) as targets:
                for target, (_, tensor) in zip(targets, tensors, strict=True):
                    tensor.copy_to(target)


def _copies(sent: SentTensors, max_bytes: int) -> dict[str, Tensor]:
    """Copies the data to tensors of their own on the CPU."""
    with _released_after(sent):
        total = sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for _, tensor in sent.pairs)
        if total > max_bytes:
            raise WeightsRejectedError(
                f"{FIELD} must have at most {max_bytes} bytes of an adapter, got {total}; lower the rank, or start the server "
                "with a higher --max-adapter-bytes.",
                field=FIELD,
            )
        copies = {}
        for name, tensor in sent.pairs:
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            tensor.copy_to(target)
            copies[name] = target.cpu()
        return copies


@contextlib.contextmanager
def _released_after(sent: SentTensors) -> Iterator[None]:
    """Lets the sender have its memory back, whatever comes of the copy: here, since the weights' exchange may have to wait."""
    try:
        yield
    except ValueError as error:
        raise MalformedRequestError(f"{FIELD} must be readable to its end, got {error}; send it again.", field=FIELD) from error
    finally:
        sent.release()
