"""Small Z-Image pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from flowroll.testing.parts import LATENT_CHANNELS, TEXT_DIM, Size, decoder_config, make_image_vae
from flowroll.testing.tokenizer import make_tokenizer
from flowroll.testing.weights import fill_random

_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [4, 6, 6]},
    "mid": {"dim": 512, "n_layers": 24, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [32, 48, 48]},
    "shapes": {"dim": 96, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 8, 8]},
}


def make_z_image(size: Size, seed: int, overrides: dict[str, Any]) -> ZImagePipeline:
    """Makes a pipeline of this size; `overrides` are fields of the transformer's configuration."""
    tokenizer, channels = make_tokenizer(), LATENT_CHANNELS[size]
    config = {
        "in_channels": channels,
        "cap_feat_dim": TEXT_DIM,
        "axes_lens": [1536, 512, 512],
        **_TRANSFORMERS[size],
        **overrides,
    }
    transformer = ZImageTransformer2DModel(**config)
    fill_random(transformer, seed)
    text_encoder = Qwen3Model(Qwen3Config(head_dim=16, **decoder_config(tokenizer)))
    fill_random(text_encoder, seed)
    vae = make_image_vae(channels, seed, scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    return ZImagePipeline(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer)
