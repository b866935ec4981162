"""Computes how much device memory the real models need, from their architectures: `python -m tools.memory_table`.

Nothing is loaded and nothing is measured on a device. The modules are built without memory ("meta" tensors), with the widths
and depths of the published checkpoints; weights are counted, and one forward and one decoding are run on such tensors while the
bytes that live at the same time are added up. Attention is counted as fused kernels run it, which keep no scores.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
# Of a card's memory: what the driver, the context of CUDA, the kernels' workspaces and the allocator's gaps may take.
_SPARE_GIB = 2.0
# Name, and GiB that a program can have.
CARDS: Mapping[str, float] = {"24 GB": 23.6, "48 GB": 47.4, "80 GB": 79.2, "141 GB": 139.8}
_META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One checkpoint as it is published.

    Attributes:
        name: Its name.
        repository: Where `hf download` finds it.
        transformer: Makes the transformer.
        vae: Makes the VAE.
        encoders: Makes the text encoders.
        forward: Calls the transformer for a picture of so many pixels a side.
        latent: Shape of the VAE's input for a picture of so many pixels a side.
    """

    name: str
    repository: str
    transformer: Callable[[], nn.Module]
    vae: Callable[[], nn.Module]
    encoders: tuple[Callable[[], nn.Module], ...]
    forward: Callable[[nn.Module, int], None]
    latent: Callable[[int], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a model takes on the device, in bytes, in bfloat16.

    Attributes:
        parameters: Number of parameters by component, with the numbers of buffers: Stable Diffusion's position table is one.
        transformer: The transformer's weights.
        others: The weights of text encoders and VAE.
        forward: The activations of one forward, its inputs included.
        decode: The activations of decoding one picture.
    """

    parameters: Mapping[str, int]
    transformer: int
    others: int
    forward: int
    decode: int

    @property
    def serving(self) -> int:
        """The peak while it rolls out: weights, and the larger one of a forward and a decoding beside it."""
        return self.transformer + self.others + self.forward + self.decode

    @property
    def updating(self) -> int:
        """The peak while new weights arrive beside the old ones."""
        return self.serving + self.transformer


def qwen_vl() -> nn.Module:
    """Qwen2.5-VL 7B (Qwen/Qwen2.5-VL-7B-Instruct, config.json)."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> nn.Module:
    """Qwen3 4B (Qwen/Qwen3-4B, config.json), without a head."""
    config = transformers.Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return transformers.Qwen3Model(config)


def clip_l() -> nn.Module:
    """The text encoder of CLIP ViT-L/14 (openai/clip-vit-large-patch14)."""
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return transformers.CLIPTextModelWithProjection(config)


def clip_g() -> nn.Module:
    """The text encoder of OpenCLIP ViT-bigG/14 (laion/CLIP-ViT-bigG-14-laion2B-39B-b160k)."""
    config = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    return transformers.CLIPTextModelWithProjection(config)


def t5_xxl() -> nn.Module:
    """The encoder of T5 v1.1 XXL (google/t5-v1_1-xxl)."""
    config = transformers.T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def vae_16() -> nn.Module:
    """The VAE of FLUX.1 and Stable Diffusion 3, which Z-Image has too: 16 channels, 8 pixels to a cell."""
    blocks = 4
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd35(**options: Any) -> Callable[[], nn.Module]:
    """A transformer of Stable Diffusion 3.5; the class has the widths of version 3."""
    return lambda: diffusers.SD3Transformer2DModel(qk_norm="rms_norm", **options)


def _forward_qwen_image(transformer: nn.Module, size: int) -> None:
    rows = size // 16
    transformer(
        hidden_states=_empty(1, rows * rows, 64),
        timestep=_empty(1),
        encoder_hidden_states=_empty(1, 512, 3584),
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, rows, rows)]],
        return_dict=False,
    )


def _forward_z_image(transformer: nn.Module, size: int) -> None:
    # The pair of guidance. Its position tables are numbers of the host, which the count does not need.
    latents = [_empty(16, 1, size // 8, size // 8) for _ in range(2)]
    transformer(latents, _empty(2), [_empty(512, 2560) for _ in range(2)], return_dict=False)


def _forward_sd3(transformer: nn.Module, size: int) -> None:
    transformer(
        hidden_states=_empty(2, 16, size // 8, size // 8),
        timestep=_empty(2),
        encoder_hidden_states=_empty(2, 333, 4096),
        pooled_projections=_empty(2, 2048),
        return_dict=False,
    )


def _image_latent(size: int) -> tuple[int, ...]:
    return (1, 16, size // 8, size // 8)


def _video_latent(size: int) -> tuple[int, ...]:
    return (1, 16, 1, size // 8, size // 8)


_SD3_ENCODERS = (clip_l, clip_g, t5_xxl)
MODELS = (
    Model(
        name="Qwen-Image",
        repository="Qwen/Qwen-Image",
        transformer=diffusers.QwenImageTransformer2DModel,
        vae=diffusers.AutoencoderKLQwenImage,
        encoders=(qwen_vl,),
        forward=_forward_qwen_image,
        latent=_video_latent,
    ),
    Model(
        name="Z-Image, Turbo",
        repository="Tongyi-MAI/Z-Image-Turbo",
        transformer=diffusers.ZImageTransformer2DModel,
        vae=vae_16,
        encoders=(qwen3,),
        forward=_forward_z_image,
        latent=_image_latent,
    ),
    Model(
        name="SD3.5 large",
        repository="stabilityai/stable-diffusion-3.5-large",
        transformer=sd35(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192),
        vae=vae_16,
        encoders=_SD3_ENCODERS,
        forward=_forward_sd3,
        latent=_image_latent,
    ),
    Model(
        name="SD3.5 medium",
        repository="stabilityai/stable-diffusion-3.5-medium",
        transformer=sd35(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        ),
        vae=vae_16,
        encoders=_SD3_ENCODERS,
        forward=_forward_sd3,
        latent=_image_latent,
    ),
)


class Peak(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make, and keeps the largest sum that lived at the same time.

    Args:
        known: What is there already, and is not counted.

    Attributes:
        live: Bytes that live now.
        peak: The largest sum so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and counts the memory that it makes."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Counts a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Puts in the place of attention what a fused kernel leaves behind: its output alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every other function as it is."""
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            query, value = given["query"], given["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def measure(model: Model, size: int) -> Memory:
    """Returns what a model takes at pictures of `size` x `size` pixels."""
    transformer, vae = _built(model.transformer), _built(model.vae)
    encoders = [_built(encoder) for encoder in model.encoders]
    parameters = {
        "transformer": _count(transformer),
        "text encoders": sum(map(_count, encoders)),
        "VAE": _count(vae),
    }
    return Memory(
        parameters=parameters,
        transformer=2 * parameters["transformer"],
        others=2 * (parameters["text encoders"] + parameters["VAE"]),
        forward=_peak(transformer, lambda: model.forward(transformer, size)),
        decode=_peak(vae, lambda: vae.decode(_empty(*model.latent(size)), return_dict=False)),
    )


def _peak(module: nn.Module, run: Callable[[], object]) -> int:
    with torch.no_grad(), _META, FusedAttention(), Peak((*module.parameters(), *module.buffers())) as peak:
        run()
    return peak.peak


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with _META:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=_META)


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def tables(size: int) -> Iterator[str]:
    """Yields the lines of both tables, as Markdown."""
    found = {model: measure(model, size) for model in MODELS}
    columns = ("transformer", "text encoders, VAE", "a forward", "a decoding", "rolling out", "with new weights")
    yield f"| at {size} x {size}, bfloat16 | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|---|"
    for model, memory in found.items():
        billions = memory.parameters["transformer"] / 1e9
        values = (memory.transformer, memory.others, memory.forward, memory.decode, memory.serving, memory.updating)
        shown = " | ".join(f"{value / GIB:.1f}" for value in values)
        yield f"| {model.name}, {billions:.1f} B | {shown} |"
    yield ""
    yield f"| card | {' | '.join(model.name for model in found)} |"
    yield "|---" * (len(found) + 1) + "|"
    for card, room in CARDS.items():
        yield f"| {card} | {' | '.join(_fits(memory, room) for memory in found.values())} |"


def _fits(memory: Memory, room_gib: float) -> str:
    room = (room_gib - _SPARE_GIB) * GIB
    if memory.updating <= room:
        return "yes"
    if memory.serving <= room:
        return "roll out; new weights by `tp` or LoRA"
    # Each rank of tp has its share of the transformer, also of the new one; rank 0 has the rest.
    ranks = next((n for n in (2, 4, 8) if memory.updating - 2 * memory.transformer * (1 - 1 / n) <= room), None)
    return "no" if ranks is None else f"`--tp {ranks}`"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels")
    print("\n".join(tables(parser.parse_args().size)))


if __name__ == "__main__":
    main()
