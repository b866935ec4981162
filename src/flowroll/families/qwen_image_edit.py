"""Qwen-Image-Edit: Qwen-Image with reference images, whose latents stand behind the sample's own in the sequence.

Conventions of diffusers' `QwenImageEditPlusPipeline` (2509 and 2511: one or several images) and `QwenImageEditPipeline` (one
image), 0.42: a reference image is resized to an area of about 1024^2 pixels with sides that are multiples of 32, and encoded by
the VAE to the mode of its distribution. The text encoder sees it too: at about 384^2 pixels behind "Picture 1: " where there
may be several images, at the VAE's size where there is one. The model's output is cut to the sample's own tokens. Guidance is
that of Qwen-Image, but there is an unconditional branch only for a request with a negative prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import InvalidRequestError
from flowroll.families.base import Prompt, StepInput, encoder_device
from flowroll.families.conditioning import REFERENCE_TOKENS, Conditioning, ConditioningField, Output
from flowroll.families.facts import Defaults, Geometry, ModelSpec, VisionFacts
from flowroll.families.qwen_image import QwenImage
from flowroll.types import DenoisingEnv, EnvValue, ParallelPlan, ReferenceImage, Split

_PLUS, _BASE = "QwenImageEditPlusPipeline", "QwenImageEditPipeline"
_LATENTS = "image_latents"
# The areas in pixels to which the pipelines resize: for the VAE, and for the text encoder of `plus`.
_VAE_AREA, _VISION_AREA = 1024 * 1024, 384 * 384
_SIDE_UNIT = 32
# The text encoder's processor takes no image with a side that is more than so many times the other.
_MOST_RATIO = 200
# The end of the position table. The text's positions begin at half of the longest side of all images, in patches.
_MOST_POSITIONS = 4096
# The pipeline has no bound of its own.
_MOST_IMAGES = 64


class QwenImageEdit(QwenImage):
    """The family of Qwen/Qwen-Image-Edit, -2509 and -2511."""

    name: ClassVar[str] = "qwen_image_edit"
    pipeline_classes: ClassVar[tuple[str, ...]] = (_PLUS, _BASE)
    tokenizers: ClassVar[tuple[str, ...]] = ("processor", "tokenizer")
    variants: ClassVar[Mapping[str, Defaults]] = {
        name: Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=4.0, negative_prompt=None)
        for name in ("plus", "base")
    }
    max_text_tokens: ClassVar[int] = _MOST_POSITIONS
    conditioning: ClassVar[Conditioning] = replace(
        QwenImage.conditioning,
        fields=(
            *QwenImage.conditioning.fields,
            ConditioningField(name=_LATENTS, source="image", shape=(REFERENCE_TOKENS, "packed"), is_passed=False),
        ),
    )
    # The reference images' rows are sharded with the sample's own. A model that takes them as clean has an index of which is
    # which, row by row.
    parallel_plan: ClassVar[ParallelPlan] = replace(
        QwenImage.parallel_plan,
        regions=tuple(
            region.following(Split(module="transformer_blocks.*", argument="modulate_index", rows=1))
            for region in QwenImage.parallel_plan.regions
        ),
    )

    @override
    def variants_of(self, index: Mapping[str, object]) -> Sequence[str]:
        return ["plus" if index["_class_name"] == _PLUS else "base"]

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        refused = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
        wanted = (
            *((option, bool(config.get(option)), False) for option in refused),
            ("in_channels", config.in_channels, 4 * pipeline.latent_channels),
        )
        self.check_options(wanted, "use a checkpoint of Qwen-Image-Edit")
        return ModelSpec(
            latent_channels=config.in_channels // 4,
            vae_scale_factor=pipeline.vae_scale_factor,
            widths={"text": config.joint_attention_dim, "packed": config.in_channels},
            max_images=_MOST_IMAGES if _takes_several(pipeline) else 1,
            vision=_vision(pipeline.processor),
        )

    @override
    def beside(self, geometry: Geometry, spec: ModelSpec, images: Sequence[ReferenceImage]) -> Geometry:
        grids = []
        for index, image in enumerate(images):
            sides = [side for area in (_VAE_AREA, _VISION_AREA) for side in _resized(area, image.height, image.width)]
            if not min(sides) or max(sides[2:]) > _MOST_RATIO * min(sides[2:]):
                raise InvalidRequestError(
                    f"images[{index}] must have sides of which one is at most {_MOST_RATIO} times the other, got "
                    f"{image.width} x {image.height} pixels; cut it.",
                    field=f"images[{index}]",
                )
            grids.append((sides[0] // spec.pixel_unit, sides[1] // spec.pixel_unit))
        return replace(geometry, references=tuple(grids))

    @override
    def image_tokens(self, spec: ModelSpec, images: Sequence[ReferenceImage]) -> tuple[int, ...]:
        assert spec.vision is not None
        area = _VISION_AREA if spec.max_images > 1 else _VAE_AREA
        return tuple(spec.vision.num_tokens(*_resized(area, image.height, image.width)) for image in images)

    @override
    def size_beside(self, spec: ModelSpec, images: Sequence[ReferenceImage]) -> tuple[int, int] | None:
        # The proportions of the last image, as in the pipeline.
        height, width = _resized(_VAE_AREA, images[-1].height, images[-1].width)
        unit = spec.pixel_unit
        return max(height // unit, 1) * unit, max(width // unit, 1) * unit

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        area = _VISION_AREA if _takes_several(pipeline) else _VAE_AREA
        resize = pipeline.image_processor.resize
        seen = [resize(image, *_resized(area, image.height, image.width)) for image in prompt.images]
        given = seen if _takes_several(pipeline) else seen[0]
        embeds, mask = pipeline.encode_prompt(prompt.text, image=given, device=encoder_device(pipeline))
        branch: dict[str, EnvValue] = {"encoder_hidden_states": embeds[0]}
        return branch if mask is None else {**branch, "encoder_hidden_states_mask": mask[0]}

    @override
    def encode_images(self, pipeline: Any, images: Sequence[Any]) -> Mapping[str, EnvValue]:
        pixels = []
        for image in images:
            sides = _resized(_VAE_AREA, image.height, image.width)
            # The pipeline for one image resizes it for the text encoder, and takes it from there.
            source = image if _takes_several(pipeline) else pipeline.image_processor.resize(image, *sides)
            pixels.append(pipeline.image_processor.preprocess(source, *sides).unsqueeze(2))
        # A pipeline that is given latents draws none, and then has no use for the size of the sample.
        _, latents = pipeline.prepare_latents(
            pixels if _takes_several(pipeline) else pixels[0],
            batch_size=1,
            num_channels_latents=pipeline.latent_channels,
            height=0,
            width=0,
            dtype=pipeline.text_encoder.dtype,
            device=pipeline.vae.device,
            generator=None,
            latents=torch.empty(0),
        )
        return {_LATENTS: latents[0]}

    @override
    def size_arguments(self, geometry: Geometry, num_tokens: int) -> Mapping[str, EnvValue]:
        grids = ((geometry.rows, geometry.columns), *geometry.references)
        most = _MOST_POSITIONS - max(max(grid) // 2 for grid in grids)
        if num_tokens > most:
            raise InvalidRequestError(
                f"prompt must have at most {most} tokens beside images of this size, with those that stand for the images, got "
                f"{num_tokens}; use a shorter text or fewer images.",
                field="prompt",
            )
        return {"img_shapes": [[[1, rows, columns] for rows, columns in grids]]}

    @override
    def model_latents(self, latents: Float[Tensor, " *latent"], env: DenoisingEnv) -> Float[Tensor, " *input"]:
        return torch.cat([latents, cast(Tensor, env.image_kwargs[_LATENTS])])

    @override
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        return super().apply_guidance(_of_sample(outputs, one), one)

    @override
    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        return super().fits_conditional(_of_sample(outputs, one), velocity, one)


def _vision(processor: Any) -> VisionFacts:
    images = processor.image_processor
    return VisionFacts(
        token_id=processor.image_token_id,
        placeholders=(processor.image_token, processor.video_token),
        side=images.patch_size * images.merge_size,
        min_pixels=images.size["shortest_edge"],
        max_pixels=images.size["longest_edge"],
    )


def _takes_several(pipeline: Any) -> bool:
    return type(pipeline).__name__ == _PLUS


def _resized(area: int, height: int, width: int) -> tuple[int, int]:
    """Returns the height and width in pixels to which the pipelines resize an image for an area."""
    ratio = width / height
    wide = math.sqrt(area * ratio)
    return round(wide / ratio / _SIDE_UNIT) * _SIDE_UNIT, round(wide / _SIDE_UNIT) * _SIDE_UNIT


def _of_sample(outputs: Sequence[Output], one: StepInput) -> list[Output]:
    """Returns the outputs without the tokens of the reference images."""
    return [cast(Tensor, output)[:, : len(one.latents)] for output in outputs]
