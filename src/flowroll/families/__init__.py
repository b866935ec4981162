"""The model families that flowroll rolls out: one file each."""

from __future__ import annotations

from collections.abc import Mapping

from flowroll.errors import UnsupportedModelError
from flowroll.families.base import Family, Guidance, Prompt, StepInput, Transformer
from flowroll.families.conditioning import ForwardInput, Output
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.flux import Flux
from flowroll.families.flux2 import Flux2
from flowroll.families.qwen_image import QwenImage
from flowroll.families.qwen_image_21 import QwenImage21
from flowroll.families.qwen_image_edit import QwenImageEdit
from flowroll.families.recipe import Recipe, StepScore
from flowroll.families.sd3 import StableDiffusion3
from flowroll.families.z_image import ZImage

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (QwenImage(), ZImage(), StableDiffusion3(), Flux(), QwenImage21(), Flux2(), QwenImageEdit())
}


def family_of_pipeline(pipeline_class: str) -> Family:
    """Returns the family of a checkpoint, by the pipeline class in its model_index.json.

    Raises:
        UnsupportedModelError: No family covers the checkpoint; the message lists what is supported.
    """
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    supported = ", ".join(f"{' or '.join(family.pipeline_classes)} ({family.name})" for family in FAMILIES.values())
    raise UnsupportedModelError(f"pipeline must be one of {supported}, got {pipeline_class}; use a checkpoint of one of these.")


__all__ = [
    "FAMILIES",
    "Defaults",
    "Family",
    "ForwardInput",
    "Geometry",
    "Guidance",
    "ModelSpec",
    "Output",
    "Prompt",
    "Recipe",
    "StepInput",
    "StepScore",
    "Transformer",
    "family_of_pipeline",
]
