"""The ways to pass a request to a method: as its prompt, as `SamplingParams`, or by the names of their fields.

`SamplingParams` is the one definition. The two classes here only repeat its names and types, as editors and type checkers want
them for keyword arguments; a test compares them with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.sampling.transition import LogProbForm
from flowroll.types.params import (
    ALIASES,
    TENSORS,
    GeneratorDevice,
    ImageFormat,
    SamplingParams,
    SdeType,
    StepField,
    StepOptions,
)
from flowroll.types.plain import plain

# Numbers of numpy and tensors of one element are accepted too; for several values, also 1-D arrays and tensors.
Integer: TypeAlias = int | SupportsIndex
Real: TypeAlias = float | SupportsFloat
Integers: TypeAlias = Collection[Integer]
Reals: TypeAlias = Collection[Real]

_FIELDS = {field.name: field for field in fields(SamplingParams)}


class ImageFields(TypedDict, total=False):
    """The fields of `SamplingParams` that plain generation has."""

    prompt: str | None
    negative_prompt: str | None
    prompt_token_ids: Sequence[Integers] | None
    negative_prompt_token_ids: Sequence[Integers] | None
    prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None
    prompt_embeds_mask: Tensor | None
    negative_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    negative_prompt_embeds_mask: Tensor | None
    images: Sequence[bytes | str] | None
    seed: Integer | None
    seeds: Integers | None
    init_seed: Integer | Integers | None
    latents: Tensor | None
    start_step: Integer | None
    generator_device: GeneratorDevice
    width: Integer | None
    height: Integer | None
    num_inference_steps: Integer | None
    num_outputs_per_prompt: Integer | None
    num_frames: Integer | None
    fps: Real | None
    guidance_scale: Real | None
    guidance_scales: Reals | None
    true_cfg_scale: Real | None
    sigmas: Reals | None
    suppress_logs: bool
    request_id: str | None
    min_weight_version: str | None
    max_staleness: Integer | None
    policy: str | None
    lora_name: str | None


class RolloutFields(ImageFields, total=False):
    """All fields of `SamplingParams`, and their short names."""

    rollout: bool
    sde_seed: Integer | Integers | None
    stop_step: Integer | None
    fork: Mapping[int, int] | Sequence[tuple[int, int]] | None
    rollout_sde_type: SdeType
    rollout_noise_level: Real
    rollout_log_prob_no_const: bool
    log_prob: LogProbForm | Mapping[str, Any] | None
    rollout_debug_mode: bool
    rollout_return_denoising_env: bool
    rollout_return_dit_trajectory: bool
    rollout_sde_step_indices: Integers | None
    rollout_steps: Sequence[StepOptions | Mapping[str, Any]] | None
    rollout_noise_levels: Reals | None
    rollout_return_step_indices: Integers | None
    return_fields: Sequence[StepField] | None
    decode_step_indices: Integers | None
    image_format: ImageFormat | None
    # The short names of the fields above.
    sde_type: SdeType
    noise_level: Real
    log_prob_no_const: bool
    debug_mode: bool
    return_denoising_env: bool
    return_dit_trajectory: bool
    sde_step_indices: Integers | None
    noise_levels: Reals | None
    return_step_indices: Integers | None


def given_fields(request: str | SamplingParams | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `SamplingParams` that a method was given, checked, with plain numbers and tuples.

    Args:
        request: The prompt, or the whole request, of which the values that differ from the defaults count as given.
        values: The fields given by name.

    Raises:
        InvalidRequestError: A name is not a field, a value is given twice or not at all, or a value breaks its rule.
    """
    if isinstance(request, SamplingParams):
        if values:
            raise InvalidRequestError("params must be given alone, got further fields; set them in SamplingParams.")
        held = {name: getattr(request, name) for name in _FIELDS}
        return {name: value for name, value in held.items() if value != _FIELDS[name].default}
    if isinstance(request, str):
        if "prompt" in values:
            raise InvalidRequestError("prompt must be given once, got it twice; leave one of them out.", field="prompt")
        values = {"prompt": request, **values}
    elif request is not None:
        raise InvalidRequestError(
            f"the first argument must be a prompt or SamplingParams, got {type(request).__name__}; give one prompt as text.",
            field="prompt",
        )
    refuse_unknown(values)
    given = {name: value if name in TENSORS else plain(value) for name, value in values.items()}
    SamplingParams(**given)
    return {ALIASES.get(name, name): value for name, value in given.items()}


def params_of(request: str | SamplingParams | None, values: Mapping[str, Any]) -> SamplingParams:
    """Returns the request that a method was given; see `given_fields`."""
    return request if isinstance(request, SamplingParams) and not values else SamplingParams(**given_fields(request, values))


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuses a name that `SamplingParams` does not have.

    Raises:
        InvalidRequestError: The name is unknown; the message says which field may be meant.
    """
    for name in names:
        if name not in _FIELDS and name not in ALIASES:
            guess = closest(name, [*_FIELDS, *ALIASES])
            remedy = f"use {guess} if that is meant" if guess else f"use one of {', '.join(_FIELDS)}"
            raise InvalidRequestError(f"{name} must be a field of SamplingParams, got an unknown name; {remedy}.", field=name)


def closest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name of which `name` is most likely a misspelling."""
    matches = difflib.get_close_matches(name[:80], list(known), n=1, cutoff=0.7)
    return matches[0] if matches else None
