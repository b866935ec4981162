"""Random inputs of a family's forwards, by what it declares: for tests and benchmarks of the forwards alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from flowroll.families import Family, Geometry, ModelSpec, StepInput
from flowroll.families.conditioning import REFERENCE_TOKENS, TOKENS, ConditioningField
from flowroll.types import EnvValue, Number


def random_text(
    family: Family, spec: ModelSpec, num_tokens: int, *, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, EnvValue]:
    """Returns the required conditioning fields of a text, as if it had been encoded.

    Args:
        family: Declares them.
        spec: The sizes of the checkpoint.
        num_tokens: Length of the text.
        dtype: The transformer's.
        generator: Draws the numbers.
    """
    fields = (field for field in family.conditioning.fields if field.source == "prompt")
    return _random_fields(fields, {**spec.widths, TOKENS: num_tokens}, dtype, generator)


def random_images(
    family: Family, spec: ModelSpec, geometry: Geometry, *, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, EnvValue]:
    """Returns the required fields of reference images, as if these had been encoded.

    Args:
        family: Declares them.
        spec: The sizes of the checkpoint.
        geometry: The shapes of a sample beside the images.
        dtype: The transformer's.
        generator: Draws the numbers.
    """
    sizes = {**spec.widths, REFERENCE_TOKENS: geometry.num_reference_tokens}
    return _random_fields(family.conditioning.in_place("image_kwargs"), sizes, dtype, generator)


def _random_fields(
    fields: Iterable[ConditioningField], sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, EnvValue]:
    return {field.name: torch.randn(field.sizes(sizes), generator=generator).to(dtype) for field in fields if field.is_required}


def random_input(
    family: Family,
    spec: ModelSpec,
    *,
    height: int,
    width: int,
    texts: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    timestep: float = 0.5,
    scale: Number = 4.0,
    embedded: Number = 3.5,
) -> StepInput:
    """Draws one sample's input of a step; beside a small reference image, for a family that demands some.

    Args:
        family: The model family.
        spec: The sizes of the checkpoint.
        height: Pixels.
        width: Pixels.
        texts: Tokens of the prompt and of the negative prompt.
        dtype: The transformer's.
        generator: Draws the numbers.
        timestep: The timestep as the model takes it.
        scale: The scale of classifier-free guidance.
        embedded: The scale that the model is given as an input, where the family declares one.
    """
    given = embedded if family.conditioning.in_place("guidance") else None
    geometry, guidance = family.geometry(spec, height=height, width=width), family.guidance(scale, given)
    if family.conditioning.in_place("image_kwargs"):
        geometry = replace(geometry, references=((3, 2),))
    images = random_images(family, spec, geometry, dtype=dtype, generator=generator)
    positive, negative = (random_text(family, spec, one, dtype=dtype, generator=generator) for one in texts)
    return StepInput(
        latents=torch.randn(geometry.latent_shape, generator=generator),
        timestep=torch.tensor([timestep], dtype=family.timestep_dtype(dtype)),
        env=family.env(positive, negative if guidance.is_active else None, geometry, images=images, embedded=given),
        guidance=guidance,
        is_first=True,
    )
