"""Small Qwen-Image-2.1 pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from flowroll.processors import without_videos
from flowroll.testing.parts import LATENT_CHANNELS, TEXT_DIM, Size, decoder_config, fill_vae
from flowroll.testing.tokenizer import make_tokenizer
from flowroll.testing.weights import fill_random

_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "mid": {"num_layers": 29, "num_attention_heads": 4, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    "shapes": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8)},
}
# A message's content is a text, or a list of parts.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# Of the vision encoder; the real one has patches of 16 pixels too.
_PATCH = 16


def make_qwen_image_21(size: Size, seed: int, overrides: dict[str, Any]) -> QwenImage21Pipeline:
    """Makes a pipeline of this size; `overrides` are fields of the transformer's configuration, or `sample_sigmas`."""
    tokenizer, channels, others = make_tokenizer(), LATENT_CHANNELS[size], dict(overrides)
    sample_sigmas = others.pop("sample_sigmas", None)
    config = {"in_channels": channels, "out_channels": channels, "context_in_dim": TEXT_DIM, **_TRANSFORMERS[size], **others}
    transformer = QwenImage21Transformer2DModel(**config)
    # Without it, a short prompt among hundreds of image tokens would hardly matter.
    fill_random(transformer, seed, {"attn.to_v.weight": 8.0})
    with torch.no_grad():
        # A scale that is stored without the 1 that is added to it.
        transformer.txt_in.text_norm.weight.copy_(torch.linspace(-0.25, 0.25, TEXT_DIM))
    text_encoder = Qwen3VLForConditionalGeneration(_qwen_vl_config(tokenizer))
    fill_random(text_encoder, seed)
    vae = AutoencoderKLQwenImage21(
        z_dim=channels,
        base_dim=8,
        decoder_base_dim=8,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[(index % 5 - 2) / 4 for index in range(channels)],
        latents_std=[1 + index % 3 / 4 for index in range(channels)],
    )
    fill_vae(vae, seed)
    images = Qwen2VLImageProcessorPil(
        patch_size=_PATCH,
        size={"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": 2**24},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192
        ),
        vae=vae,
        text_encoder=text_encoder,
        processor=without_videos(Qwen3VLProcessor)(images, tokenizer, chat_template=_CHAT_TEMPLATE),
        transformer=transformer,
        sample_sigmas=sample_sigmas,
    )


def _qwen_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    def token(text: str) -> int:
        index = tokenizer.convert_tokens_to_ids(text)
        assert isinstance(index, int)
        return index

    return Qwen3VLConfig(
        text_config={
            **decoder_config(tokenizer),
            "head_dim": TEXT_DIM // 4,
            # Sections of the 8 rotary frequencies for time, row and column.
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
                "rope_theta": 5_000_000.0,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_DIM,
            "num_position_embeddings": 64,
            "patch_size": _PATCH,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
