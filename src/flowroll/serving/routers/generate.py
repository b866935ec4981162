"""POST /generate: plain text-to-image."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from flowroll.errors import InvalidRequestError
from flowroll.serving.errors import WORK_RESPONSES
from flowroll.serving.negotiation import PNG, WIRE_FORMATS, choose_media_type, wire_media_types
from flowroll.serving.openapi import MSGPACK_CONTENT, PNG_CONTENT, request_body, tensor_answer
from flowroll.serving.parsing import accept_request
from flowroll.serving.responses import stream, whole
from flowroll.serving.state import AppState
from flowroll.types.pictures import encode_png
from flowroll.wire.codec import encode_images
from flowroll.wire.messages import WireImage
from flowroll.wire.names import GENERATE_ROUTE
from flowroll.wire.schema import GenerateRequest

SEED_HEADER = "x-flowroll-seed"
_SEED = {"description": f"The seed of the picture, where the answer is {PNG}.", "schema": {"type": "integer"}}


def build_router(state: AppState) -> APIRouter:
    """Returns the generation route."""
    router = APIRouter(tags=["images"])

    @router.post(
        GENERATE_ROUTE,
        summary="Generate images",
        description=f"With `Accept: image/png` the answer is the picture itself, its seed in the header {SEED_HEADER}.",
        response_class=Response,
        responses={
            **WORK_RESPONSES,
            200: tensor_answer(WireImage, "One object per image, or the one image", is_list=True, **PNG_CONTENT)
            | {"headers": {SEED_HEADER: _SEED}},
        },
        openapi_extra=request_body(GenerateRequest, **MSGPACK_CONTENT),
    )
    async def generate(request: Request) -> Response:
        media_type = choose_media_type(request.headers, [*wire_media_types(state.config), PNG])
        plan = (await accept_request(request, state, GenerateRequest))[1]
        if media_type == PNG and len(plan.seeds) > 1:
            raise InvalidRequestError(
                f"num_outputs_per_prompt must be 1 for {PNG}, got {len(plan.seeds)}; accept application/json for several.",
                field="num_outputs_per_prompt",
            )
        images = await state.run(request, plan, "generate")
        if media_type == PNG:
            content = await state.serialise(request, encode_png, images[0].image)
            return whole(request, content, PNG, {SEED_HEADER: str(images[0].seed)})
        return stream(request, await state.serialise(request, encode_images, images, wire_format=WIRE_FORMATS[media_type]))

    return router
