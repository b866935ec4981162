"""Small FLUX.2 pipelines: klein, base and distilled, and dev."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flowroll.testing.parts import LATENT_CHANNELS, TEXT_DIM, Size, decoder_config, fill_vae
from flowroll.testing.tokenizer import make_mistral_tokenizer, make_tokenizer
from flowroll.testing.weights import fill_random

# The pipelines read the hidden states of these layers; behind the last one, a norm follows.
_KLEIN_LAYERS, _DEV_LAYERS = 28, 31
_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)},
    "mid": {"num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32)},
    "shapes": {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 24, "axes_dims_rope": (6, 6, 6, 6)},
}


def make_flux2(size: Size, seed: int, overrides: dict[str, Any]) -> Flux2KleinPipeline | Flux2Pipeline:
    """A pipeline of klein-base of this size; `overrides` are fields of the transformer's configuration.

    With `guidance_embeds=True` it is one of dev. `is_distilled=True`, a field of the pipeline's configuration, makes it one of
    the distilled klein.
    """
    is_distilled = overrides.pop("is_distilled", False)
    # Twice as many as in the other families.
    channels = 2 * LATENT_CHANNELS[size]
    config = {
        "in_channels": 4 * channels,
        "num_attention_heads": 4,
        "joint_attention_dim": 3 * TEXT_DIM,
        "guidance_embeds": False,
        **_TRANSFORMERS[size],
        **overrides,
    }
    transformer = Flux2Transformer2DModel(**config)
    # Without it, what a prompt says among hundreds of tokens of padding would hardly matter.
    fill_random(transformer, seed, {"attn.add_v_proj.weight": 4.0})
    parts = {
        "transformer": transformer,
        "vae": _make_vae(channels, seed),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            shift=3.0,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    }
    if config["guidance_embeds"]:
        tokenizer = make_mistral_tokenizer()
        return Flux2Pipeline(tokenizer=tokenizer, text_encoder=_make_mistral(tokenizer, seed), **parts)
    qwen = make_tokenizer()
    text_encoder = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **{**decoder_config(qwen), "num_hidden_layers": _KLEIN_LAYERS}))
    fill_random(text_encoder, seed)
    return Flux2KleinPipeline(tokenizer=qwen, text_encoder=text_encoder, is_distilled=is_distilled, **parts)


def _make_mistral(tokenizer: PreTrainedTokenizerFast, seed: int) -> Mistral3ForConditionalGeneration:
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                **decoder_config(tokenizer),
                "model_type": "mistral",
                "head_dim": 16,
                "num_hidden_layers": _DEV_LAYERS,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 16,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )
    )
    fill_random(encoder, seed)
    return encoder


def _make_vae(channels: int, seed: int) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=1024,
    )
    fill_vae(vae, seed)
    generator = torch.Generator().manual_seed(seed)
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    assert mean is not None and variance is not None
    mean.normal_(std=0.1, generator=generator)
    variance.uniform_(0.5, 1.5, generator=generator)
    return vae
