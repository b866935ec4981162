"""Small Qwen-Image-Edit pipelines.

Every reference image has an area of about 1024^2 pixels in these pipelines, whatever the model. So that it is 1,024 tokens in
small ones, not 4,096, their VAE has 16 pixels for a latent cell instead of 8, and sides are multiples of 32.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

from flowroll.processors import without_videos
from flowroll.testing.parts import LATENT_CHANNELS, Size, fill_vae
from flowroll.testing.qwen_image import make_scheduler, make_text_encoder, make_transformer
from flowroll.testing.tokenizer import make_tokenizer

# The pipelines drop the tokens of the system message by their number, so each word of it has to be one token.
_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the "
    "user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while "
    "maintaining consistency with the original input where appropriate."
)
_PREFIX = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"
# Pixels of a patch of the vision encoder; the real one has 14.
_PATCH = 28


def make_qwen_image_edit(size: Size, seed: int, overrides: dict[str, Any]) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """Makes a pipeline of this size.

    Args:
        size: The size of the transformer.
        seed: Same seed, same weights.
        overrides: Fields of the transformer's configuration, or `takes_several`: False for the pipeline of one image.
    """
    others = dict(overrides)
    kind = QwenImageEditPlusPipeline if others.pop("takes_several", True) else QwenImageEditPipeline
    tokenizer, channels = make_tokenizer(_SYSTEM), LATENT_CHANNELS[size]
    # With as many channels everywhere the encoder can do without blocks, and is fast enough for its large pictures.
    vae = AutoencoderKLQwenImage(
        z_dim=channels,
        base_dim=8,
        dim_mult=[1] * 5,
        num_res_blocks=0,
        temperal_downsample=[False] * 4,
        latents_mean=[(index % 5 - 2) / 4 for index in range(channels)],
        latents_std=[1 + index % 3 / 4 for index in range(channels)],
    )
    fill_vae(vae, seed)
    images = Qwen2VLImageProcessorPil(patch_size=_PATCH, size={"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": 4 * 1024**2})
    pipeline = kind(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, seed, patch_size=_PATCH),
        tokenizer=tokenizer,
        processor=without_videos(Qwen2VLProcessor)(images, tokenizer, chat_template=tokenizer.chat_template),
        transformer=make_transformer(size, seed, others),
    )
    prefix = tokenizer(_PREFIX).input_ids
    assert len(prefix) == pipeline.prompt_template_encode_start_idx, f"the prompt prefix is {len(prefix)} tokens long"
    return pipeline
