"""Trains a pipeline's transformer to draw the world's prompts.

The captions are noisy on purpose: a quarter of them belong to another picture. So the model knows what a prompt means and draws
something else now and then, as real models do, which guidance and reinforcement learning can both put right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from flowroll.examples.shapes import autoencoder
from flowroll.examples.shapes.descent import minimise
from flowroll.examples.shapes.world import SCENES
from flowroll.families import Family, Prompt
from flowroll.types import EnvValue

# The fields of an encoded caption, by name.
Text = Mapping[str, EnvValue]

_WRONG_CAPTIONS, _NO_CAPTIONS = 0.25, 0.1
_PICTURES, _CHUNK = 4096, 64
# Noise levels are drawn evenly, then moved towards 1, where it is decided what is drawn.
_SIGMA_SHIFT = 2.0


def train(
    pipeline: Any, family: Family, *, steps: int, batch: int, generator: torch.Generator, report: Callable[[int, float], None]
) -> None:
    """Trains `pipeline.transformer` in place by flow matching: x = (1 - sigma) x0 + sigma eps, target eps - x0.

    Args:
        pipeline: A pipeline with a trained VAE; its text encoders stay as they are.
        family: The pipeline's.
        steps: Optimizer steps.
        batch: Pictures per step.
        generator: The source of pictures, captions, noise levels and noise.
        report: Called with the step and the loss.
    """
    transformer = pipeline.transformer
    _initialise(transformer, generator)
    captions = _captions(pipeline, family)
    latents, scenes = _dataset(pipeline.vae, generator)

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        even = torch.rand(batch, generator=generator)
        sigmas = _SIGMA_SHIFT * even / (1 + (_SIGMA_SHIFT - 1) * even)
        mixed = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1))
        texts = [captions[caption] for caption in _noisy(scenes[chosen].tolist(), generator)]
        return (velocities(transformer, family, mixed, sigmas, texts) - (noise - clean)).square().mean()

    minimise(transformer, loss, steps=steps, weight_decay=0.01, report=report)


def velocities(
    transformer: Any,
    family: Family,
    cells: Float[Tensor, "batch channels rows columns"],
    sigmas: Float[Tensor, " batch"],
    texts: Sequence[Text],
) -> Float[Tensor, "batch channels rows columns"]:
    """The velocities of a batch, captions of any length: fast, and not exact as the family's own `velocity` is."""
    embeds: list[Any] = [text[family.embeds_key] for text in texts]
    output: Tensor
    if family.name == "z_image":
        outputs: list[Tensor] = transformer(list(cells.unsqueeze(2)), 1 - sigmas, embeds, return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)
    if family.name == "sd3":
        kept, times = _without_repeats(torch.stack(embeds))
        pooled: list[Any] = [text["pooled_projections"] for text in texts]
        with _LastKeyCounts(times):
            output = transformer(
                hidden_states=cells,
                timestep=1000 * sigmas,
                encoder_hidden_states=kept,
                pooled_projections=torch.stack(pooled),
                return_dict=False,
            )[0]
        return output
    batch, channels, rows, columns = cells.shape
    packed = torch.stack([family.initial_latents(one[None, None]) for one in cells])
    lengths = torch.tensor([len(text) for text in embeds])
    output = transformer(
        hidden_states=packed,
        timestep=sigmas,
        encoder_hidden_states=torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        encoder_hidden_states_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        img_shapes=[[(1, rows // 2, columns // 2)]] * batch,
        return_dict=False,
    )[0]
    grid = output.view(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(cells.shape)


def _without_repeats(texts: Float[Tensor, "batch tokens dim"]) -> tuple[Float[Tensor, "batch kept dim"], int]:
    """The rows of texts up to the last different one, and how often the last row stands there in a row.

    Where T5 is absent, 256 rows of zeros stand in for it: most of a text of Stable Diffusion 3.
    """
    differs = (texts != texts[:, -1:]).any(dim=2).any(dim=0)
    first = int(differs.nonzero().max()) + 1
    return texts[:, : first + 1], texts.shape[1] - first


class _LastKeyCounts(TorchFunctionMode):
    """Attention in which the last key and value stand for several equal ones.

    Equal rows of a text stay equal from layer to layer, as nothing tells their places apart. n equal keys have n times the
    weight of one: log n is added to its score. In Stable Diffusion 3's attention the text follows the image, so they are last.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self._bonus = math.log(times)

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            bonus = torch.zeros(1, args[1].shape[2])
            bonus[0, -1] = self._bonus
            kwargs["attn_mask"] = bonus
        return func(*args, **kwargs)


def _initialise(transformer: Any, generator: torch.Generator) -> None:
    """Draws the weights as the classes do, with every modulation at zero: each block begins as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        fresh = type(transformer).from_config(transformer.config)
    transformer.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "pad_token" in name:  # the class leaves these unset
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            elif any(part in name for part in ("img_mod.1", "txt_mod.1", "adaLN_modulation", ".norm1.", ".norm1_context.")):
                parameter.zero_()


@torch.no_grad()
def _captions(pipeline: Any, family: Family) -> Mapping[int | None, Text]:
    """Each scene's encoded prompt by its index, and the family's negative prompt by None."""
    negative = next(iter(family.variants.values())).negative_prompt
    prompts: dict[int | None, str] = {index: scene.prompt for index, scene in enumerate(SCENES)}
    prompts[None] = negative or ""
    encoded = {index: family.encode(pipeline, Prompt(text=prompt)) for index, prompt in prompts.items()}
    # Copies: what an encoder returns may be part of a larger tensor.
    return {
        index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in text.items()}
        for index, text in encoded.items()
    }


def _dataset(vae: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents of pictures, and their scenes."""
    chunks = [autoencoder.pictures(_CHUNK, generator) for _ in range(_PICTURES // _CHUNK)]
    latents = torch.cat([autoencoder.encode(vae, images) for images, _ in chunks])
    return latents, torch.tensor(list(itertools.chain.from_iterable(scenes for _, scenes in chunks)))


def _noisy(scenes: Sequence[int], generator: torch.Generator) -> list[int | None]:
    """Captions of pictures of these scenes: some of them wrong, some left out."""
    draws = torch.rand(len(scenes), generator=generator).tolist()
    others = torch.randint(len(SCENES), (len(scenes),), generator=generator).tolist()
    captions: list[int | None] = []
    for scene, other, drawn in zip(scenes, others, draws, strict=True):
        if drawn < _NO_CAPTIONS:
            captions.append(None)
        else:
            captions.append(other if drawn < _NO_CAPTIONS + _WRONG_CAPTIONS else scene)
    return captions
