"""How a request is given to a method: as its text, as `SamplingParams`, or by the names of their fields.

`SamplingParams` is the one definition. The two classes here only repeat its names and types, as editors and type checkers want
them for keyword arguments; a test compares them with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

from flowroll.errors import InvalidRequestError
from flowroll.types.params import GeneratorDevice, SamplingParams, SdeType
from flowroll.types.plain import plain

# numpy's numbers and tensors of one element too; and for several, 1-D arrays and tensors.
Integer: TypeAlias = int | SupportsIndex
Real: TypeAlias = float | SupportsFloat
Integers: TypeAlias = Collection[Integer]
Reals: TypeAlias = Collection[Real]

_FIELDS = {field.name: field for field in fields(SamplingParams)}


class ImageFields(TypedDict, total=False):
    """The fields of `SamplingParams` that plain generation has."""

    prompt: str
    negative_prompt: str | None
    seed: Integer | None
    seeds: Integers | None
    generator_device: GeneratorDevice
    width: Integer | None
    height: Integer | None
    num_inference_steps: Integer | None
    num_outputs_per_prompt: Integer | None
    guidance_scale: Real | None
    true_cfg_scale: Real | None
    sigmas: Reals | None
    suppress_logs: bool
    request_id: str | None
    min_weight_version: str | None
    lora_name: str | None


class RolloutFields(ImageFields, total=False):
    """All fields of `SamplingParams`."""

    rollout: bool
    sde_type: SdeType
    noise_level: Real
    log_prob_no_const: bool
    debug_mode: bool
    return_denoising_env: bool
    return_dit_trajectory: bool
    sde_step_indices: Integers | None
    return_step_indices: Integers | None


def given_fields(request: str | SamplingParams | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a method was given, by the names of `SamplingParams`, each value checked and as they hold it.

    Args:
        request: The prompt, or the whole request, of which what differs from the defaults counts as given.
        values: The fields given by name.

    Raises:
        InvalidRequestError: A name is no field, something is given twice or not at all, or a value breaks its rule.
    """
    if isinstance(request, SamplingParams):
        if values:
            raise InvalidRequestError("params must be given alone, got further fields; set them in SamplingParams.")
        held = {name: getattr(request, name) for name in _FIELDS}
        return {name: value for name, value in held.items() if name == "prompt" or value != _FIELDS[name].default}
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
    if "prompt" not in values:
        raise InvalidRequestError("prompt must be given, got nothing; send one prompt as text.", field="prompt")
    params = SamplingParams(**{name: plain(value) for name, value in values.items()})
    return {name: getattr(params, name) for name in values}


def params_of(request: str | SamplingParams | None, values: Mapping[str, Any]) -> SamplingParams:
    """The request that a method was given; see `given_fields`."""
    return request if isinstance(request, SamplingParams) and not values else SamplingParams(**given_fields(request, values))


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuses a name that is no field of `SamplingParams`.

    Raises:
        InvalidRequestError: Says which field may be meant.
    """
    for name in names:
        if name not in _FIELDS:
            guess = closest(name, _FIELDS)
            remedy = f"use {guess} if that is meant" if guess else f"use one of {', '.join(_FIELDS)}"
            raise InvalidRequestError(f"{name} must be a field of SamplingParams, got an unknown name; {remedy}.", field=name)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a misspelling of."""
    matches = difflib.get_close_matches(name[:80], list(known), n=1, cutoff=0.7)
    return matches[0] if matches else None
