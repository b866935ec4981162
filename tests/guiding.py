"""Requests with classifier-free guidance, as each family wants to be asked for it."""

from collections.abc import Mapping
from typing import Any

from flowroll.families import FAMILIES

SIDES = ("height", "width")
# Where a side is a multiple of something else than 16.
UNITS = {"qwen_image_21": 32}


def in_words_of(family: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request, with its `guidance_scale` as the scale of classifier-free guidance.

    Where there are two scales, that one is `true_cfg_scale`; the model's own is another number. A negative prompt is added
    where the family has none of its own, and sides are rounded up to what the family has.
    """
    defaults, unit = next(iter(FAMILIES[family].variants.values())), UNITS.get(family, 16)
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
