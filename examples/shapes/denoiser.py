"""Trains a pipeline's transformer to draw the world's prompts.

The captions are noisy on purpose: a quarter of them belong to another picture. So the model knows what a prompt means and draws
something else now and then, as real models do, which guidance and reinforcement learning can both put right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from examples.shapes import autoencoder
from examples.shapes.descent import minimise
from examples.shapes.world import SCENES
from flowroll.families import Family, Prompt

_WRONG_CAPTIONS, _NO_CAPTIONS = 0.25, 0.1
_PICTURES, _CHUNK = 4096, 64
# Noise levels are drawn evenly, then moved towards 1, where it is decided what is drawn.
_SIGMA_SHIFT = 2.0


def train(
    pipeline: Any, family: Family, *, steps: int, batch: int, generator: torch.Generator, report: Callable[[int, float], None]
) -> None:
    """Trains `pipeline.transformer` in place by flow matching: x = (1 - sigma) x0 + sigma eps, target eps - x0.

    Args:
        pipeline: With a trained VAE; its text encoder stays as it is.
        family: The pipeline's.
        steps: Optimizer steps.
        batch: Pictures per step.
        generator: Of pictures, captions, noise levels and noise.
        report: Called with the step and the loss.
    """
    transformer = pipeline.transformer
    _initialise(transformer, generator)
    embeds = _captions(pipeline, family)
    latents, scenes = _dataset(pipeline.vae, generator)

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        even = torch.rand(batch, generator=generator)
        sigmas = _SIGMA_SHIFT * even / (1 + (_SIGMA_SHIFT - 1) * even)
        mixed = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1))
        texts = [embeds[caption] for caption in _noisy(scenes[chosen].tolist(), generator)]
        return (velocities(transformer, family, mixed, sigmas, texts) - (noise - clean)).square().mean()

    minimise(transformer, loss, steps=steps, weight_decay=0.01, report=report)


def velocities(
    transformer: Any,
    family: Family,
    cells: Float[Tensor, "batch channels rows columns"],
    sigmas: Float[Tensor, " batch"],
    texts: Sequence[Float[Tensor, "tokens dim"]],
) -> Float[Tensor, "batch channels rows columns"]:
    """The velocities of a batch, captions of any length: fast, and not exact as the family's own `velocity` is."""
    if family.name == "z_image":
        outputs = transformer(list(cells.unsqueeze(2)), 1 - sigmas, list(texts), return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)
    batch, channels, rows, columns = cells.shape
    packed = torch.stack([family.initial_latents(one[None, None]) for one in cells])
    lengths = torch.tensor([len(text) for text in texts])
    output = transformer(
        hidden_states=packed,
        timestep=sigmas,
        encoder_hidden_states=torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True),
        encoder_hidden_states_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        img_shapes=[[(1, rows // 2, columns // 2)]] * batch,
        return_dict=False,
    )[0]
    grid = output.view(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(cells.shape)


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
            elif any(part in name for part in ("img_mod.1", "txt_mod.1", "adaLN_modulation")):
                parameter.zero_()


@torch.no_grad()
def _captions(pipeline: Any, family: Family) -> Mapping[int | None, Tensor]:
    """The embedding of each scene's prompt by its index, and of the family's negative prompt by None."""
    negative = next(iter(family.variants.values())).negative_prompt
    prompts = {**{index: scene.prompt for index, scene in enumerate(SCENES)}, None: negative}
    encoded = {index: family.encode(pipeline, Prompt(text=prompt))[family.embeds_key] for index, prompt in prompts.items()}
    return {index: embeds.clone() for index, embeds in encoded.items() if isinstance(embeds, Tensor)}


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
