"""POST /v1/images/generations, POST /v1/images/edits and GET /v1/models, as OpenAI's clients call them."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Meta

from flowroll.errors import NotFoundError
from flowroll.serving.errors import COMMON_RESPONSES, WORK_RESPONSES
from flowroll.serving.forms import FORM
from flowroll.serving.negotiation import choose_media_type
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_request
from flowroll.serving.responses import whole
from flowroll.serving.state import AppState
from flowroll.types import GeneratedImage
from flowroll.types.pictures import encode_png
from flowroll.wire.codec import JSON
from flowroll.wire.schema import ImageEditsRequest, ImagesRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model of this server.

    Attributes:
        id: The checkpoint folder's name.
        object: What this is.
        created: When the server started; Unix time, seconds.
        owned_by: Who serves it.
    """

    id: Annotated[str, Meta(examples=["Qwen-Image"])]
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["flowroll"] = "flowroll"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModels:
    """A list of one.

    Attributes:
        object: What this is.
        data: The model.
    """

    object: Literal["list"] = "list"
    data: list[ServedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base64Image:
    """One image of an OpenAI answer.

    Attributes:
        b64_json: The PNG in base64.
    """

    b64_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesObject:
    """Answer of POST /v1/images/generations and /v1/images/edits.

    Attributes:
        created: Unix time, seconds.
        data: The images.
    """

    created: int
    data: list[Base64Image]


_RESPONSES: dict[int | str, dict[str, object]] = {
    **WORK_RESPONSES,
    200: {"model": ImagesObject, "description": "The images as base64 PNG"},
}


def build_router(state: AppState) -> APIRouter:
    """Returns the routes that OpenAI has too."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    info = state.engine.facts.info
    served = ServedModel(id=Path(info.model).resolve().name, created=int(time.time()))

    @router.get("/models", summary="The served model", responses=COMMON_RESPONSES)
    async def models() -> ServedModels:
        return ServedModels(data=[served])

    @router.post(
        "/images/generations",
        summary="Generate images, OpenAI style",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra=request_body(ImagesRequest),
    )
    async def generate_images(request: Request) -> Response:
        return await answer(request, ImagesRequest)

    @router.post(
        "/images/edits",
        summary="Edit images, OpenAI style",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra=request_body(ImageEditsRequest, FORM),
    )
    async def edit_images(request: Request) -> Response:
        return await answer(request, ImageEditsRequest)

    async def answer(request: Request, kind: type[ImagesRequest] | type[ImageEditsRequest]) -> Response:
        choose_media_type(request.headers, [JSON])
        accepted, plan = await accept_request(request, state, kind)
        if accepted.model not in (None, served.id, info.model):
            raise NotFoundError(f"model must be {served.id}, got {accepted.model[:80]!r}; leave it out.", field="model")
        images = await state.run(request, plan, "generate")
        return whole(request, await state.serialise(request, _answer, images), JSON)

    return router


def _answer(images: Sequence[GeneratedImage]) -> bytes:
    data = [Base64Image(b64_json=base64.b64encode(encode_png(image.image)).decode()) for image in images]
    return msgspec.json.encode(ImagesObject(created=int(time.time()), data=data))
