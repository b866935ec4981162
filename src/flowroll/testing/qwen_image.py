"""Small Qwen-Image pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from flowroll.testing.parts import LATENT_CHANNELS, TEXT_DIM, Size, decoder_config, fill_vae
from flowroll.testing.tokenizer import make_tokenizer
from flowroll.testing.weights import fill_random

_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "mid": {"num_layers": 11, "num_attention_heads": 4, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    "shapes": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8)},
}
# Without blocks the encoder cannot run, which a random one need not.
_VAES: Mapping[str, dict[str, Any]] = {
    "tiny": {"base_dim": 8, "num_res_blocks": 0},
    "mid": {"base_dim": 8, "num_res_blocks": 0},
    "shapes": {"base_dim": 8, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
}


def make_qwen_image(size: Size, seed: int, overrides: dict[str, Any]) -> QwenImagePipeline:
    """Makes a pipeline of this size; `overrides` are fields of the transformer's configuration."""
    tokenizer, channels = make_tokenizer(), LATENT_CHANNELS[size]
    vae = AutoencoderKLQwenImage(z_dim=channels, **_VAES[size])
    fill_vae(vae, seed)
    return QwenImagePipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=make_transformer(size, seed, overrides),
    )


def make_transformer(size: Size, seed: int, overrides: dict[str, Any]) -> QwenImageTransformer2DModel:
    """Makes a transformer of this size; `overrides` are fields of its configuration."""
    channels = LATENT_CHANNELS[size]
    config = {
        "in_channels": 4 * channels,
        "out_channels": channels,
        "joint_attention_dim": TEXT_DIM,
        **_TRANSFORMERS[size],
        **overrides,
    }
    transformer = QwenImageTransformer2DModel(**config)
    # Without it, a short prompt among hundreds of image tokens would hardly matter.
    fill_random(transformer, seed, {"attn.add_v_proj.weight": 16.0})
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Makes the scheduler of the real checkpoints."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def make_text_encoder(tokenizer: Qwen2Tokenizer, seed: int, **vision: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Makes a text encoder for the tokenizer; `vision` are fields of the configuration of its vision encoder."""
    text_encoder = Qwen2_5_VLForConditionalGeneration(_qwen_vl_config(tokenizer, vision))
    fill_random(text_encoder, seed)
    return text_encoder


def _qwen_vl_config(tokenizer: Qwen2Tokenizer, vision: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    def token(text: str) -> int:
        index = tokenizer.convert_tokens_to_ids(text)
        assert isinstance(index, int)
        return index

    return Qwen2_5_VLConfig(
        text_config={
            **decoder_config(tokenizer),
            # Sections of the 8 rotary frequencies for time, row and column.
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1_000_000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_DIM,
            "fullatt_block_indexes": [0],
            **vision,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
