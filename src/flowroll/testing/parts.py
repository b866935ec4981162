"""What the small checkpoints of several families have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLQwenImage21
from transformers import Qwen2Tokenizer

from flowroll.testing.weights import fill_random

Size: TypeAlias = Literal["tiny", "mid", "shapes"]

TEXT_DIM = 64
# 16 in the real ones; few are learned faster.
LATENT_CHANNELS: Mapping[str, int] = {"tiny": 16, "mid": 16, "shapes": 4}


def fill_vae(vae: AutoencoderKL | AutoencoderKLQwenImage | AutoencoderKLQwenImage21, seed: int) -> None:
    """Draws a VAE's weights so that its pictures are gray clouds."""
    fill_random(vae, seed, {"decoder.conv_out.weight": 1.5})
    with torch.no_grad():
        # What reaches the last convolution is positive on average: a colour cast, unless each colour's weights sum to 0.
        weight = vae.decoder.conv_out.weight
        weight -= weight.mean(dim=1, keepdim=True)


def decoder_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Returns the dimensions that the decoders among the text encoders share."""
    return {
        # Padded, as the real ones are.
        "vocab_size": (len(tokenizer) + 127) // 128 * 128,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 2 * TEXT_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_image_vae(channels: int, seed: int, **config: Any) -> AutoencoderKL:
    """Makes a small `AutoencoderKL` of the real ones' eight pixels per latent cell."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
        **config,
    )
    fill_vae(vae, seed)
    return vae
