"""Requests with classifier-free guidance, as each family wants to be asked for it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from flowroll.families import FAMILIES


def in_words_of(family: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request, with its `guidance_scale` as the scale of classifier-free guidance.

    Where there are two scales, that one is `true_cfg_scale` and takes a negative prompt; the model's own is another number.
    """
    has_two = next(iter(FAMILIES[family].variants.values())).true_cfg_scale is not None
    if not has_two or "true_cfg_scale" in request or "guidance_scale" not in request:
        return dict(request)
    scale = request["guidance_scale"]
    return {"negative_prompt": "blurry", **request, "true_cfg_scale": scale, "guidance_scale": 1.5 + scale}


def guided(family: str, scale: float, **request: Any) -> dict[str, Any]:
    """The request with classifier-free guidance of this scale."""
    return in_words_of(family, {**request, "guidance_scale": scale})


def in_words_of_pipeline(pipeline: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request, with its negative prompt as the pipeline takes it: some take an embedding, and "" where there is none."""
    given = dict(request)
    if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters and (text := given.pop("negative_prompt", "")):
        with torch.no_grad():
            given["negative_prompt_embeds"] = pipeline.encode_prompt(text)[0]
    return given
