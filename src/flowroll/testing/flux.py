"""Small FLUX.1 pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from flowroll.testing.encoders import make_clip_encoder, make_t5_encoder
from flowroll.testing.parts import LATENT_CHANNELS, TEXT_DIM, Size, make_image_vae
from flowroll.testing.tokenizer import make_clip_tokenizer, make_t5_tokenizer
from flowroll.testing.weights import fill_random

_CLIP_DIM = 48
_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "mid": {"num_layers": 5, "num_single_layers": 13, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    "shapes": {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8)},
}


def make_flux(size: Size, seed: int, overrides: dict[str, Any]) -> FluxPipeline:
    """Makes a pipeline of this size; `overrides` are fields of the transformer's configuration.

    With `guidance_embeds=False` it is one of schnell: no guidance input, and a schedule that no image size shifts.
    """
    channels = LATENT_CHANNELS[size]
    config = {
        "in_channels": 4 * channels,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": _CLIP_DIM,
        "guidance_embeds": True,
        **_TRANSFORMERS[size],
        **overrides,
    }
    transformer = FluxTransformer2DModel(**config)
    # Without it, what a prompt says among hundreds of tokens of padding would hardly matter.
    fill_random(transformer, seed, {"attn.add_v_proj.weight": 4.0})
    is_dev = config["guidance_embeds"]
    clip, t5 = make_clip_tokenizer(), make_t5_tokenizer()
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=is_dev,
            shift=3.0 if is_dev else 1.0,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=make_image_vae(channels, seed, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=make_clip_encoder(CLIPTextModel, clip, _CLIP_DIM, seed),
        tokenizer=clip,
        text_encoder_2=make_t5_encoder(t5, seed),
        tokenizer_2=t5,
    )
