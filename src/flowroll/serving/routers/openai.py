"""POST /v1/images/generations and GET /v1/models, as OpenAI's clients call them."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from flowroll.errors import NotFoundError
from flowroll.serving.errors import COMMON_RESPONSES, WORK_RESPONSES
from flowroll.serving.negotiation import choose_media_type
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_request
from flowroll.serving.state import AppState
from flowroll.types import GeneratedImage
from flowroll.wire.codec import JSON
from flowroll.wire.png import encode_png
from flowroll.wire.responses import Base64Image, ImagesObject
from flowroll.wire.schema import ImagesRequest


class ServedModel(BaseModel):
    """The model of this server."""

    id: str = Field(description="The checkpoint folder's name.", examples=["Qwen-Image"])
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started; Unix time, seconds.")
    owned_by: Literal["flowroll"] = "flowroll"


class ServedModels(BaseModel):
    """A list of one."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


def build_router(state: AppState) -> APIRouter:
    """The routes that OpenAI has too."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    info = state.worker.engine.info
    served = ServedModel(id=Path(info.model).resolve().name, created=int(time.time()))

    @router.get("/models", summary="The served model", responses=COMMON_RESPONSES)
    async def models() -> ServedModels:
        return ServedModels(data=[served])

    @router.post(
        "/images/generations",
        summary="Generate images, OpenAI style",
        response_class=Response,
        responses={
            **WORK_RESPONSES,
            200: {"model": ImagesObject, "description": "The images as base64 PNG"},
        },
        openapi_extra=request_body(ImagesRequest),
    )
    async def generate_images(request: Request) -> Response:
        choose_media_type(request.headers, [JSON])
        accepted, plan = await accept_request(request, state, ImagesRequest)
        if accepted.model not in (None, served.id, info.model):
            raise NotFoundError(f"model must be {served.id}, got {accepted.model[:80]!r}; leave it out.", field="model")
        images = await state.generate(request, plan)
        return Response(await state.serialise(request, _answer, images), media_type=JSON)

    return router


def _answer(images: Sequence[GeneratedImage]) -> bytes:
    data = [Base64Image(b64_json=base64.b64encode(encode_png(image.image)).decode()) for image in images]
    return ImagesObject(created=int(time.time()), data=data).model_dump_json().encode()
