"""Requests with classifier-free guidance and reference images, as each family wants to be asked for them."""

import functools
import inspect
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import load_image
from PIL import Image

from flowroll.engine import Engine, RequestPlan
from flowroll.families import FAMILIES
from flowroll.types import SamplingParams

SIDES = ("height", "width")
# Where a side is a multiple of something else than 16.
UNITS = {"qwen_image_21": 32, "qwen_image_edit": 32}


def image_file(width: int = 48, height: int = 48, *, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A file with a picture of colored clouds."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand((3, 3, 4 if mode == "RGBA" else 3), generator=generator) * 255).byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


PICTURE = image_file()


def takes_images(family: str) -> bool:
    """Whether a request for the family has reference images."""
    return bool(FAMILIES[family].conditioning.in_place("image_kwargs"))


def pictured(family: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with a reference image, where the family demands one and there is none."""
    return {"images": (PICTURE,), **request} if takes_images(family) else dict(request)


class PicturedEngine(Engine):
    """An engine for tests that run for every family: where its model edits images, a request without any has one."""

    def plan(self, params: SamplingParams) -> RequestPlan:
        is_given = params.images is not None or not self.info.max_images
        return super().plan(params if is_given else replace(params, images=(PICTURE,)))


def pictured_pipeline(family: str, pipeline: Any) -> Any:
    """The pipeline, which now has the same reference image where it is called without one."""
    if takes_images(family):
        kind = type(pipeline)

        @functools.wraps(kind.__call__)
        def call(self: Any, image: Any = None, **values: Any) -> Any:
            return kind.__call__(self, opened(PICTURE) if image is None else image, **values)

        pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipeline


def opened(file: bytes) -> Image.Image:
    """The picture of a file as diffusers decodes it."""
    return load_image(Image.open(io.BytesIO(file)))


def in_words_of(family: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request, with its `guidance_scale` as the scale of classifier-free guidance.

    Where there are two scales, that one is `true_cfg_scale`; the model's own is another number. A negative prompt is added
    where the family has none of its own, and sides are rounded up to what the family has.
    """
    defaults, unit = next(iter(FAMILIES[family].variants.values())), UNITS.get(family, 16)
    request = pictured(family, request)
    request = {name: -(-value // unit) * unit if name in SIDES else value for name, value in request.items()}
    if defaults.negative_prompt is None and "guidance_scale" in request:
        request = {"negative_prompt": "blurry", **request}
    if defaults.true_cfg_scale is None or "true_cfg_scale" in request or "guidance_scale" not in request:
        return dict(request)
    scale = request["guidance_scale"]
    return {**request, "true_cfg_scale": scale, "guidance_scale": 1.5 + scale}


def guided(family: str, scale: float, **request: Any) -> dict[str, Any]:
    """The request with classifier-free guidance of this scale."""
    return in_words_of(family, {**request, "guidance_scale": scale})


def in_words_of_pipeline(pipeline: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request, with its negative prompt as the pipeline takes it: some take an embedding, and "" where there is none.

    Reference images are decoded as diffusers decodes them.
    """
    given = dict(request)
    if files := given.pop("images", None):
        given["image"] = [opened(file) for file in files] if len(files) > 1 else opened(files[0])
    if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters and (text := given.pop("negative_prompt", "")):
        with torch.no_grad():
            given["negative_prompt_embeds"] = pipeline.encode_prompt(text)[0]
    return given
