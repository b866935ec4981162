"""Small text encoders that several families have."""

from __future__ import annotations

from typing import TypeVar

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from flowroll.testing.parts import TEXT_DIM
from flowroll.testing.weights import fill_random

Clip = TypeVar("Clip", CLIPTextModel, CLIPTextModelWithProjection)


def make_clip_encoder(kind: type[Clip], tokenizer: CLIPTokenizer, dim: int, seed: int) -> Clip:
    """Makes a CLIP text encoder of this class and width."""
    encoder = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=dim,
            intermediate_size=2 * dim,
            projection_dim=dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    fill_random(encoder, seed)
    return encoder


def make_t5_encoder(tokenizer: T5TokenizerFast, seed: int) -> T5EncoderModel:
    """Makes a T5 encoder of the width that the other text encoders have."""
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    fill_random(encoder, seed)
    return encoder
