"""Small Stable Diffusion 3 pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from flowroll.testing.encoders import make_clip_encoder, make_t5_encoder
from flowroll.testing.parts import LATENT_CHANNELS, TEXT_DIM, Size, make_image_vae
from flowroll.testing.tokenizer import make_clip_tokenizer, make_t5_tokenizer
from flowroll.testing.weights import fill_random

# Of the two CLIP encoders; together they are narrower than T5, whose width theirs is filled up to.
_CLIP_DIMS = (16, 32)
# As 3.5 medium: norms of queries and keys, and in the first layers a second attention over the image alone.
_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "dual_attention_layers": (0,)},
    "mid": {"num_layers": 11, "num_attention_heads": 8, "attention_head_dim": 64, "dual_attention_layers": (0, 1)},
    # The table of positions is saved with the weights: a large one would outweigh them.
    "shapes": {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 20,
        "dual_attention_layers": (),
        "pos_embed_max_size": 32,
        "sample_size": 64,
    },
}


def make_sd3(size: Size, seed: int, overrides: dict[str, Any]) -> StableDiffusion3Pipeline:
    """Makes a pipeline of this size; `overrides` are fields of the transformer's configuration."""
    channels = LATENT_CHANNELS[size]
    config = {
        "sample_size": 128,
        "pos_embed_max_size": 96,
        "in_channels": channels,
        "out_channels": channels,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": sum(_CLIP_DIMS),
        "qk_norm": "rms_norm",
        **_TRANSFORMERS[size],
        **overrides,
    }
    width = config["num_attention_heads"] * config["attention_head_dim"]
    transformer = SD3Transformer2DModel(**{"caption_projection_dim": width, **config})
    # The pooled prompt shapes every modulation. At full gain the two branches have hardly anything in common, and guidance at 4
    # makes velocities of three and more.
    fill_random(transformer, seed, {"text_embedder.linear_2.weight": 0.3})
    clips = [make_clip_tokenizer(), make_clip_tokenizer(pad_token="!")]
    # As many people save it; a T5 is also most of what a small checkpoint would weigh, and of the time to train with it.
    t5 = None if size == "shapes" else make_t5_tokenizer()
    encoders = [
        make_clip_encoder(CLIPTextModelWithProjection, clip, dim, seed) for clip, dim in zip(clips, _CLIP_DIMS, strict=True)
    ]
    vae = make_image_vae(channels, seed, scaling_factor=1.5305, shift_factor=0.0609)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=clips[0],
        text_encoder_2=encoders[1],
        tokenizer_2=clips[1],
        text_encoder_3=None if t5 is None else make_t5_encoder(t5, seed),
        tokenizer_3=t5,
    )
