"""How many floating-point operations a forward must take, from the architecture alone: products and attention.

A product of n rows of width a to width b takes 2 n a b operations; attention of n queries over n keys of width d 4 n^2 d.
Norms, activations and rotary embeddings are left out, as torch's own count leaves them out. d is the width, S the number of
image tokens, T that of text tokens, L the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The width of the sinusoidal embedding of a timestep.
_TIMESTEP = 256
# Z-Image pads images and captions to multiples of this many tokens; its modulation has that width at most.
_Z_TOKENS, _Z_MODULATION, _Z_TIMESTEP = 32, 256, 1024


def qwen_image(config: Any, image: int, texts: Sequence[int]) -> int:
    """Counts one forward per branch, of S + T tokens each.

    A block: per token 4 d^2 (queries, keys, values, output) and 8 d^2 (feed-forward), 2 x 6 d^2 for the modulation of both
    streams, and attention over S + T. Around the blocks: d (c_in + c_out) S + d c_text T, the timestep's d (256 + d), and 2 d^2
    of the last modulation.
    """
    d = config.num_attention_heads * config.attention_head_dim
    total = 0
    for text in texts:
        tokens = image + text
        block = 2 * (12 * d * d * tokens + 12 * d * d) + 4 * tokens**2 * d
        ends = d * (config.in_channels * 2 * image + config.joint_attention_dim * text) + d * (_TIMESTEP + d) + 2 * d * d
        total += config.num_layers * block + 2 * ends
    return total


def z_image(config: Any, image: int, texts: Sequence[int]) -> int:
    """Counts one forward of all branches, with both token counts rounded up to 32 and texts to the longest one.

    A block: per token 4 d^2 and 3 d h (h = 8 d / 3, the gated feed-forward), attention over its tokens, and 4 d 256 for its
    modulation. The refiners run over S with modulation and over T without; the L blocks over S + T.
    """
    d, branches = config.dim, len(texts)
    hidden = int(d / 3 * 8)
    image, text = (-(-count // _Z_TOKENS) * _Z_TOKENS for count in (image, max(texts)))

    def block(tokens: int, modulation: int) -> int:
        return 2 * ((4 * d * d + 3 * d * hidden) * tokens + modulation) + 4 * tokens**2 * d

    modulation = 4 * d * min(d, _Z_MODULATION)
    blocks = config.n_refiner_layers * (block(image, modulation) + block(text, 0))
    blocks += config.n_layers * block(image + text, modulation)
    patch = config.in_channels * config.all_patch_size[0] ** 2
    ends = d * patch * (2 * image + text) + config.cap_feat_dim * d * text + d * _Z_MODULATION + 2 * _TIMESTEP * _Z_TIMESTEP
    return branches * (blocks + 2 * ends)


def sd3(config: Any, image: int, texts: Sequence[int]) -> int:
    """Counts one forward of all branches, of S + T tokens each.

    A block: per token 4 d^2 and 8 d^2, 2 x 6 d^2 for both modulations, attention over S + T. The last one uses its text for
    keys and values alone: 3 d^2 a text token, and 2 d^2 of modulation. A dual block attends to the image once more, with 4 d^2
    an image token and 3 d^2 of modulation. Around the blocks: 2 c p^2 d S + c_text d T, d (256 + c_pooled + 2 d), and 2 d^2.
    """
    d, (text, *_) = config.num_attention_heads * config.attention_head_dim, texts
    tokens, dual = image + text, sum(layer < config.num_layers for layer in config.dual_attention_layers)
    blocks = config.num_layers * (2 * 12 * d * d * (tokens + 1) + 4 * tokens**2 * d)
    blocks -= 2 * (9 * d * d * text + 4 * d * d)
    blocks += dual * (2 * (4 * d * d * image + 3 * d * d) + 4 * image**2 * d)
    patch = config.in_channels * config.patch_size**2
    ends = 2 * patch * d * image + config.joint_attention_dim * d * text
    ends += d * (_TIMESTEP + config.pooled_projection_dim + 2 * d) + 2 * d * d
    return len(texts) * (blocks + 2 * ends)


# The floating-point operations of a step of one sample, by family, from the transformer's configuration, the number of image
# tokens, and the number of text tokens of each branch.
STEP_FLOPS: Mapping[str, Callable[[Any, int, Sequence[int]], int]] = {
    "qwen_image": qwen_image,
    "z_image": z_image,
    "sd3": sd3,
}
