"""The published architectures as checkpoint folders without weights: configurations at full size, and small tokenizers.

Of a folder's files, flowroll and its libraries read everything but the weights; `empty_weights` stands in for those.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from flowroll.engine import loading
from flowroll.engine.checkpoint import Checkpoint
from flowroll.testing import make_checkpoint

Config = Mapping[str, Any]

# Qwen2.5-VL 7B (Qwen/Qwen2.5-VL-7B-Instruct, config.json).
_QWEN_VL: Config = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
}
# Qwen3 4B (Qwen/Qwen3-4B, config.json), without a head.
_QWEN3: Config = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
# The text encoder of CLIP ViT-L/14 (openai/clip-vit-large-patch14).
_CLIP_L: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
# The text encoder of OpenCLIP ViT-bigG/14 (laion/CLIP-ViT-bigG-14-laion2B-39B-b160k).
_CLIP_G: Config = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
# The encoder of T5 v1.1 XXL (google/t5-v1_1-xxl).
_T5: Config = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
# The VAE of FLUX.1 and Stable Diffusion 3, which Z-Image has too: 16 channels, 8 pixels to a cell.
_VAE_16: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD3_ENCODERS = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5}
# The class has the widths of version 3.
_SD35: Config = {"qk_norm": "rms_norm", "pooled_projection_dim": 2048}
# The names that configurations give to numbers of layers, and to sides of tables that take long to compute.
_DEPTHS = ("num_layers", "n_layers", "num_hidden_layers", "depth")
_TABLES = {"pos_embed_max_size": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One checkpoint as it is published.

    Attributes:
        name: Its name.
        family: The family that runs it.
        variant: The family's variant.
        transformer: The transformer's options, where they are not the defaults of its class.
        vae: The VAE's, likewise.
        encoders: The options of each text encoder.
    """

    name: str
    family: str
    variant: str
    transformer: Config = field(default_factory=dict)
    vae: Config = field(default_factory=dict)
    encoders: Mapping[str, Config]


QWEN_IMAGE = Model(
    name="Qwen-Image",
    family="qwen_image",
    variant="base",
    transformer={"num_layers": 60},
    encoders={"text_encoder": _QWEN_VL},
)
Z_IMAGE = Model(
    name="Z-Image",
    family="z_image",
    variant="base",
    # Longer than the class's default, as the published configuration has it.
    transformer={"axes_lens": [1536, 512, 512], "n_layers": 30},
    vae={**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    encoders={"text_encoder": _QWEN3},
)
SD35_MEDIUM = Model(
    name="SD3.5 medium",
    family="sd3",
    variant="3.5-medium",
    transformer={
        **_SD35,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    vae={**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    encoders=_SD3_ENCODERS,
)
SD35_LARGE = Model(
    name="SD3.5 large",
    family="sd3",
    variant="base",
    transformer={
        **_SD35,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
    vae={**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    encoders=_SD3_ENCODERS,
)
MODELS = (QWEN_IMAGE, Z_IMAGE, SD35_MEDIUM, SD35_LARGE)


def make_folder(model: Model, folder: Path, *, layers: int | None = None) -> Path:
    """Makes the folder of a checkpoint at full size, without its weights.

    Args:
        model: The checkpoint.
        folder: Where to make it.
        layers: The most layers of the transformer and of the text encoders, with tables for small pictures; None: all.
    """
    make_checkpoint(model.family, folder)
    for component, options in {"transformer": model.transformer, "vae": model.vae, **model.encoders}.items():
        path = folder / component / "config.json"
        small = _without_layers(json.loads(path.read_text()))
        if component.startswith("text_encoder"):
            config = {**small, **{name: _joined(small.get(name), value) for name, value in options.items()}}
        else:
            config = {"_class_name": small["_class_name"], **options}
        path.write_text(json.dumps(_cut(config, layers)))
    return folder


def _without_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without what it says of single layers, of which a small one has fewer."""
    found = {name: _without_layers(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return {name: value for name, value in found.items() if name not in ("layer_types", "max_window_layers")}


def _joined(small: Any, full: Any) -> Any:
    return {**small, **full} if isinstance(small, dict) and isinstance(full, Mapping) else full


def _cut(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """Returns the configuration with no more layers than these."""
    if layers is None:
        return dict(config)
    found = {name: _cut(value, layers) if isinstance(value, Mapping) else value for name, value in config.items()}
    most = {**dict.fromkeys(_DEPTHS, layers), **_TABLES}
    return {name: min(value, most[name]) if name in most else value for name, value in found.items()}


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Stands in for the bytes of weight files: every weight has its shape and dtype, and is one number in the host's memory."""

    def load_component(checkpoint: Checkpoint, component: str, dtype: torch.dtype) -> Any:
        if not component.startswith("text_encoder"):
            return _filled(loading.empty_module(checkpoint, component), dtype).to(dtype)
        kind = getattr(transformers, checkpoint.class_of(component))
        with init_empty_weights(include_buffers=False):
            config = kind.config_class.from_pretrained(checkpoint.folder / component)
            encoder: nn.Module = kind(config)
        return _filled(encoder, dtype)

    with (
        mock.patch.object(loading, "load_component", load_component),
        mock.patch.object(loading, "_load_shards", lambda _, transformer, dtype: _filled(transformer, dtype)),
        mock.patch.object(Checkpoint, "check_stored", lambda *_: None),
        mock.patch.object(Checkpoint, "check_finite", lambda *_: None),
    ):
        yield


def _filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Gives a module without memory weights of one number each."""
    for owner in module.modules():
        for name, empty in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(one_number(empty.shape, dtype)))
    return module


def one_number(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns zeros of this shape on the host, all in one place."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))
