"""POST /update_weights_from_tensor: pickled handles of tensors in shared memory or on GPUs, as SGLang's trainers send them.

Of `serialized_named_tensors`, which has an entry for each of the trainer's ranks, only the first is read: what the others name
is neither copied nor released.
"""

from __future__ import annotations

import binascii

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.incoming import IncomingWeights
from flowroll.engine.weights import tensor_head
from flowroll.errors import ForbiddenError, MalformedRequestError
from flowroll.serving.errors import WEIGHTS_RESPONSES, ErrorBody
from flowroll.serving.intake import read_body
from flowroll.serving.openapi import request_body
from flowroll.serving.services import Services
from flowroll.types import check_version
from flowroll.wire.arrivals import SharedUpdateObject, UpdateFromTensorRequest
from flowroll.wire.names import UPDATE_FROM_TENSOR_ROUTE
from flowroll.wire.pickled import FIELD, SentTensors, named_tensors
from flowroll.wire.schema import parse, parse_json_body

# Handles, not data: a thousand tensors take half a megabyte a rank.
_MAX_BODY = 64 * 2**20


def build_router(services: Services) -> APIRouter:
    """The route for tensors that are not in the body."""
    router = APIRouter(tags=["weights"])

    @router.post(
        UPDATE_FROM_TENSOR_ROUTE,
        summary="Take new weights from shared memory or a GPU",
        description="A bucket of an update, as SGLang's trainers send it; the weights are exchanged once all tensors of the "
        "module are there. Buckets of one update have the same `weight_version`. Of `serialized_named_tensors` only the first "
        "entry is read; what the others name is not released. An error ends the update; everything stays.",
        responses={
            **WEIGHTS_RESPONSES,
            403: {"model": ErrorBody, "description": "Not started with --allow-pickle-weights, or no tensors in the pickle"},
        },
        openapi_extra=request_body(UpdateFromTensorRequest),
    )
    async def update_weights_from_tensor(request: Request) -> SharedUpdateObject:
        if not services.config.allow_pickle_weights:
            raise ForbiddenError(
                "the server must be started with leave to read pickled tensors, got none; start it with "
                "--allow-pickle-weights, or send safetensors."
            )
        body = await read_body(request, services, _MAX_BODY)
        accepted, sent = await run_in_threadpool(_decode, body)
        try:
            names = [name for name, _ in sent.pairs]
            return await services.take_bucket(accepted, names, lambda incoming: _copy(incoming, sent))
        finally:
            # Of a bucket that nobody wanted, too.
            sent.release()

    return router


def _decode(body: bytearray) -> tuple[UpdateFromTensorRequest, SentTensors]:
    accepted = parse(UpdateFromTensorRequest, parse_json_body(body))
    if accepted.weight_version is not None:
        check_version(accepted.weight_version, "weight_version")
    try:
        data = binascii.a2b_base64(accepted.serialized_named_tensors[0], strict_mode=True)
    except ValueError as error:
        raise MalformedRequestError(f"{FIELD} must be base64, got {error}; encode it again.", field=FIELD) from error
    return accepted, named_tensors(data, flattened=accepted.load_format is not None)


def _copy(incoming: IncomingWeights, sent: SentTensors) -> None:
    """Copies the data, and lets the sender have its memory back, whatever comes of it."""
    tensors = sent.pairs
    try:
        if tensors:
            heads = [tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
            with incoming.bucket(heads, device=tensors[0][1].device) as targets:
                for target, (_, tensor) in zip(targets, tensors, strict=True):
                    tensor.copy_to(target)
    except ValueError as error:
        raise MalformedRequestError(f"{FIELD} must be readable to its end, got {error}; send it again.", field=FIELD) from error
    finally:
        # Here, not after the weights' exchange, which may have to wait.
        sent.release()
