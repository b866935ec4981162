"""Checkpoint folders of the real diffusers classes with random weights, built offline.

Owns the sizes of the small models. What flowroll promises about real checkpoints (schedules, latent channels, the 8x VAE,
the text template) is as in them; widths and depths are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from flowroll.errors import CheckpointError, InvalidRequestError
from flowroll.testing.tokenizer import make_tokenizer
from flowroll.testing.weights import align_file, fill_random

FamilyName: TypeAlias = Literal["qwen_image", "z_image"]
Size: TypeAlias = Literal["tiny", "mid", "shapes"]

_TEXT_DIM = 64
# 16 in the real ones; few are learned faster.
_LATENT_CHANNELS: Mapping[str, int] = {"tiny": 16, "mid": 16, "shapes": 4}
_QWEN_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "mid": {"num_layers": 11, "num_attention_heads": 4, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
    "shapes": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8)},
}
# Without blocks the encoder cannot run, which a random one need not.
_QWEN_VAES: Mapping[str, dict[str, Any]] = {
    "tiny": {"base_dim": 8, "num_res_blocks": 0},
    "mid": {"base_dim": 8, "num_res_blocks": 0},
    "shapes": {"base_dim": 8, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
}
_Z_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [4, 6, 6]},
    "mid": {"dim": 512, "n_layers": 24, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [32, 48, 48]},
    "shapes": {"dim": 96, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 8, 8]},
}


def make_checkpoint(family: FamilyName, directory: str | Path, *, seed: int = 0, size: Size = "tiny", **overrides: Any) -> Path:
    """Builds a pipeline with random weights and saves it as a checkpoint folder; needs no network.

    Args:
        family: "qwen_image" or "z_image".
        directory: Where to save; made if need be. A checkpoint that is there is overwritten.
        seed: Same seed, same bytes.
        size: "tiny"; "mid": about 100 million parameters in the transformer; or "shapes": about one million, the architecture
            that `examples.shapes.train` trains.
        **overrides: Fields of the transformer's configuration, e.g. `num_layers`.

    Returns:
        The folder.

    Raises:
        InvalidRequestError: An unknown family or size.
        CheckpointError: The path is taken by something that is no folder.
    """
    for field, value, known in (("family", family, get_args(FamilyName)), ("size", size, get_args(Size))):
        if value not in known:
            raise InvalidRequestError(f"{field} must be one of {', '.join(known)}, got {value}; choose one.", field=field)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"directory must be a folder or free, got the file {folder}; choose another path.")
    build: Callable[[Size, int, dict[str, Any]], DiffusionPipeline] = {"qwen_image": _qwen_image, "z_image": _z_image}[family]
    # The classes draw initial weights from the global generator, which is the caller's.
    with torch.random.fork_rng(devices=[]):
        pipeline = build(size, seed, overrides)
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        align_file(file)
    return folder


def _qwen_image(size: Size, seed: int, overrides: dict[str, Any]) -> QwenImagePipeline:
    tokenizer, channels = make_tokenizer(), _LATENT_CHANNELS[size]
    config = {
        "in_channels": 4 * channels,
        "out_channels": channels,
        "joint_attention_dim": _TEXT_DIM,
        **_QWEN_TRANSFORMERS[size],
        **overrides,
    }
    transformer = QwenImageTransformer2DModel(**config)
    # Without it, a short prompt among hundreds of image tokens would hardly matter.
    fill_random(transformer, seed, {"attn.add_v_proj.weight": 16.0})
    text_encoder = Qwen2_5_VLForConditionalGeneration(_qwen_vl_config(tokenizer))
    fill_random(text_encoder, seed)
    vae = AutoencoderKLQwenImage(z_dim=channels, **_QWEN_VAES[size])
    _fill_vae(vae, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


def _fill_vae(vae: AutoencoderKL | AutoencoderKLQwenImage, seed: int) -> None:
    fill_random(vae, seed, {"decoder.conv_out.weight": 1.5})
    with torch.no_grad():
        # What reaches the last convolution is positive on average: a colour cast, unless each colour's weights sum to 0.
        weight = vae.decoder.conv_out.weight
        weight -= weight.mean(dim=1, keepdim=True)


def _qwen_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    def token(text: str) -> int:
        index = tokenizer.convert_tokens_to_ids(text)
        assert isinstance(index, int)
        return index

    return Qwen2_5_VLConfig(
        text_config={
            **_decoder_config(tokenizer),
            # Sections of the 8 rotary frequencies for time, row and column.
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1_000_000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": _TEXT_DIM,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def _decoder_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """The dimensions that both text encoders share."""
    return {
        # Padded, as the real ones are.
        "vocab_size": (len(tokenizer) + 127) // 128 * 128,
        "hidden_size": _TEXT_DIM,
        "intermediate_size": 2 * _TEXT_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _z_image(size: Size, seed: int, overrides: dict[str, Any]) -> ZImagePipeline:
    tokenizer, channels = make_tokenizer(), _LATENT_CHANNELS[size]
    config = {
        "in_channels": channels,
        "cap_feat_dim": _TEXT_DIM,
        "axes_lens": [1536, 512, 512],
        **_Z_TRANSFORMERS[size],
        **overrides,
    }
    transformer = ZImageTransformer2DModel(**config)
    fill_random(transformer, seed)
    text_encoder = Qwen3Model(Qwen3Config(head_dim=16, **_decoder_config(tokenizer)))
    fill_random(text_encoder, seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    _fill_vae(vae, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    return ZImagePipeline(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer)
