"""The layout of an answer in both dialects: converts a `Rollout` to plain containers with tensors as leaves, and back.

Owns the names of every response field. It does not know how leaves become bytes: the codec and the rollout files use the
same layout with leaves of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flowroll.families import FAMILIES
from flowroll.families.conditioning import TOKENS, Argument, Conditioning, ConditioningField
from flowroll.types import (
    SCHEMA_VERSION,
    DebugTensors,
    DenoisingEnv,
    EnvValue,
    GeneratedImage,
    Rollout,
    SamplingRecord,
    StepImages,
    StepTensors,
    Trajectory,
    is_readable_version,
)
from flowroll.wire.messages import (
    DEBUG_NAMES,
    Dialect,
    Leaf,
    SentEnv,
    WireEnv,
    WireImage,
    WireSample,
    WireStepImages,
    WireStepTensors,
    WireTrajectory,
)

# For a family that this version of flowroll does not have, only the text embedding is known.
_ANY_FAMILY = Conditioning(
    latents=Argument(name="hidden_states"),
    fields=(ConditioningField(name="encoder_hidden_states", shape=(TOKENS, "text"), is_listed_by_sglang=True),),
)

# Image shapes have three levels.
_MAX_ENV_DEPTH = 8
# What is sent as it is, under the same name: of every sample, of plain pictures, of rollouts.
_OF_SAMPLES = (
    *("request_id", "prompt", "seed", "sampling", "weight_version", "inference_time_s"),
    *("first_step", "last_step", "left_out"),
)
_OF_PICTURES = (*_OF_SAMPLES, "exactness")
_OF_ROLLOUTS = (*_OF_SAMPLES, "sde_step_indices", "peak_memory_mb", "provenance")


class LayoutError(ValueError):
    """An answer that is well-formed but not laid out as a rollout."""


def rollout_to_wire(rollout: Rollout, dialect: Dialect) -> WireSample[Tensor]:
    """Makes the response object of a rollout, with tensors unchanged."""
    debug, env, trajectory = rollout.debug_tensors, rollout.denoising_env, rollout.dit_trajectory
    fields, images = rollout.step_tensors, rollout.step_images
    return WireSample(
        **_unchanged(rollout, _OF_ROLLOUTS),
        generated_output=rollout.image,
        latents=rollout.latents,
        rollout_log_probs=rollout.log_probs,
        rollout_debug_tensors=None if debug is None else _debug_to_wire(debug, dialect),
        denoising_env=None if env is None else env_to_wire(env, dialect, conditioning_of(rollout.sampling), rollout.sampling),
        dit_trajectory=None if trajectory is None else _trajectory_to_wire(trajectory, dialect),
        step_tensors=None if fields is None else WireStepTensors(step_indices=fields.step_indices, tensors={**fields.tensors}),
        step_images=None if images is None else WireStepImages(step_indices=images.step_indices, images=[*images.images]),
    )


def rollout_from_wire(sample: WireSample[Leaf], load: Callable[[Leaf], Tensor]) -> Rollout:
    """Makes the rollout from a response object of either dialect.

    Each difference of the sglang dialect is recognized by itself: the debug names, embeds in a list, one timestep more than
    there are steps.

    Args:
        sample: The decoded object.
        load: Makes the tensor from a leaf.

    Raises:
        LayoutError: The object is not a rollout of this version of flowroll.
    """
    _check_version(sample.sampling)
    debug, env, trajectory = sample.rollout_debug_tensors, sample.denoising_env, sample.dit_trajectory
    log_probs, num_steps = sample.rollout_log_probs, sample.sampling.num_inference_steps
    _check_indices(sample.sde_step_indices or (), num_steps, "sde_step_indices")
    return Rollout(
        **_unchanged(sample, _OF_ROLLOUTS),
        image=_image(sample.generated_output, load, sample.sampling),
        latents=_final(sample.latents, load, sample.sampling),
        log_probs=None if log_probs is None else _of_steps(_of_rank(1, load(log_probs), "rollout_log_probs"), num_steps),
        debug_tensors=None if debug is None else _debug_from_wire(debug, load, num_steps),
        denoising_env=None if env is None else env_from_wire(env, load, conditioning_of(sample.sampling), sample.sampling),
        dit_trajectory=None if trajectory is None else _trajectory_from_wire(trajectory, load, num_steps),
        step_tensors=None if sample.step_tensors is None else _fields_from_wire(sample.step_tensors, load, num_steps),
        step_images=None if sample.step_images is None else _images_from_wire(sample.step_images, load, sample.sampling),
    )


def image_to_wire(image: GeneratedImage) -> WireImage[Tensor]:
    """Makes the response object of a generated image, with tensors unchanged."""
    return WireImage(**_unchanged(image, _OF_PICTURES), generated_output=image.image, latents=image.latents)


def image_from_wire(sample: WireImage[Leaf], load: Callable[[Leaf], Tensor]) -> GeneratedImage:
    """Makes the generated image from a response object.

    Raises:
        LayoutError: The object was made by another version of flowroll.
    """
    _check_version(sample.sampling)
    picture, latents = _picture(load(sample.generated_output), sample.sampling), load(sample.latents)
    return GeneratedImage(**_unchanged(sample, _OF_PICTURES), image=picture, latents=latents)


def _unchanged(source: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _check_version(record: SamplingRecord) -> None:
    if not is_readable_version(record.schema_version):
        raise LayoutError(f"schema_version {record.schema_version} where this flowroll reads up to {SCHEMA_VERSION}")


def _debug_to_wire(debug: DebugTensors, dialect: Dialect) -> dict[str, Tensor]:
    return {(name if dialect == "native" else sglang): getattr(debug, name) for name, sglang in DEBUG_NAMES.items()}


def _debug_from_wire(tensors: Mapping[str, Leaf], load: Callable[[Leaf], Tensor], num_steps: int) -> DebugTensors:
    found = {}
    for name, sglang in DEBUG_NAMES.items():
        leaf = tensors.get(name, tensors.get(sglang))
        if leaf is None:
            raise LayoutError(f"rollout_debug_tensors without {name}")
        found[name] = _of_steps(load(leaf), num_steps)
    return DebugTensors(**found)


def conditioning_of(record: SamplingRecord) -> Conditioning:
    """Returns what a record's family declares about its environments."""
    family = FAMILIES.get(record.family)
    return _ANY_FAMILY if family is None else family.conditioning


def env_to_wire(
    env: DenoisingEnv, dialect: Dialect, conditioning: Conditioning, record: SamplingRecord | None = None
) -> SentEnv[Tensor]:
    """Makes the object of an environment, with tensors unchanged.

    Args:
        env: The environment.
        dialect: Whose names the object uses.
        conditioning: What the family declares about its environments.
        record: The record of the sample; without it, position ids go as they are.
    """
    axes = None if record is None else record.rope_axes

    def branch(values: Mapping[str, EnvValue]) -> dict[str, Any]:
        renamed: dict[str, Any] = dict(values)
        if dialect == "sglang" and conditioning.table is not None and axes is not None:
            renamed = conditioning.table.replace_ids(values, axes)
        for field in conditioning.fields if dialect == "sglang" else ():
            if field.name in renamed:
                value = renamed.pop(field.name)
                renamed[field.sglang_name or field.name] = [value] if field.is_listed_by_sglang else value
        return renamed

    negative = env.neg_cond_kwargs
    return SentEnv(
        image_kwargs={**env.image_kwargs},
        pos_cond_kwargs=branch(env.pos_cond_kwargs),
        neg_cond_kwargs=None if negative is None else branch(negative),
        guidance=env.guidance,
    )


def env_from_wire(
    env: WireEnv[Leaf],
    load: Callable[[Leaf], Tensor],
    conditioning: Conditioning,
    record: SamplingRecord | None = None,
) -> DenoisingEnv:
    """Makes the environment from an object of either dialect.

    Args:
        env: The decoded object.
        load: Makes the tensor from a leaf.
        conditioning: What the family declares about its environments.
        record: The record of the sample, which tells what a table of positions stands for.

    Raises:
        LayoutError: A list holds a tensor and something else, lists are nested too deeply, or a table of positions is not
            that of the record's image.
    """

    def loaded(value: object, depth: int = 0) -> EnvValue:
        if isinstance(value, list):
            if depth == _MAX_ENV_DEPTH:
                raise LayoutError(f"lists in more than {_MAX_ENV_DEPTH} levels")
            return [loaded(item, depth + 1) for item in value]
        return value if isinstance(value, int | float | str) else load(cast(Leaf, value))

    def branch(values: Mapping[str, object]) -> dict[str, EnvValue]:
        native = {key: loaded(value) for key, value in values.items()}
        for field in conditioning.fields:
            name = field.sglang_name or field.name
            if field.is_listed_by_sglang and isinstance(native.get(name), list):
                match native.pop(name):
                    case [Tensor() as tensor]:
                        native[field.name] = tensor
                    case _:
                        raise LayoutError(f"{name} that is a list of anything but one tensor")
            elif name != field.name and not field.is_listed_by_sglang and name in native:
                native[field.name] = native.pop(name)
        return _with_ids(native, conditioning, record)

    return DenoisingEnv(
        image_kwargs={key: loaded(value) for key, value in env.image_kwargs.items()},
        pos_cond_kwargs=branch(env.pos_cond_kwargs),
        neg_cond_kwargs=None if env.neg_cond_kwargs is None else branch(env.neg_cond_kwargs),
        guidance=None if env.guidance is None else load(env.guidance),
    )


def _with_ids(branch: dict[str, EnvValue], conditioning: Conditioning, record: SamplingRecord | None) -> dict[str, EnvValue]:
    """Returns a branch with position ids where it has their table."""
    table = conditioning.table
    if table is None or table.name not in branch or record is None:
        return branch
    if record.rope_axes is None:
        raise LayoutError(f"{table.name} beside a record without rope_axes, which it is made with")
    embeds = branch.get(conditioning.embeds.name)
    try:
        return table.restore_ids(branch, embeds, record.rope_axes, height=record.height, width=record.width)
    except ValueError as error:
        raise LayoutError(str(error)) from None


def _trajectory_to_wire(trajectory: Trajectory, dialect: Dialect) -> WireTrajectory[Tensor]:
    timesteps, indices = trajectory.timesteps, trajectory.latent_step_indices
    return WireTrajectory(
        latents=trajectory.latents,
        timesteps=timesteps if dialect == "native" else torch.cat([timesteps, timesteps.new_zeros(1)]),
        sigmas=trajectory.sigmas,
        latent_step_indices=indices if dialect == "native" else torch.tensor(indices, dtype=torch.int64),
    )


def _trajectory_from_wire(trajectory: WireTrajectory[Leaf], load: Callable[[Leaf], Tensor], num_steps: int) -> Trajectory:
    latents, indices = load(trajectory.latents), _indices(trajectory.latent_step_indices, load, num_steps)
    sigmas = _of_rank(1, load(trajectory.sigmas), "sigmas")
    timesteps = _of_rank(1, load(trajectory.timesteps), "timesteps")
    if len(timesteps) == num_steps + 1:
        timesteps = timesteps[:-1].clone()
    if (len(timesteps), len(sigmas)) != (num_steps, num_steps + 1) or latents.shape[:1] != (len(indices),):
        raise LayoutError(f"dit_trajectory whose latents, timesteps or sigmas do not fit {num_steps} steps")
    _check_indices(indices, num_steps + 1, "latent_step_indices")
    return Trajectory(latents=latents, latent_step_indices=indices, timesteps=timesteps, sigmas=sigmas)


def _indices(sent: tuple[int, ...] | Leaf, load: Callable[[Leaf], Tensor], num_steps: int) -> tuple[int, ...]:
    """Returns the indices of the kept latents, which are a list in one dialect and a tensor in the other."""
    if isinstance(sent, tuple):
        return sent
    tensor = load(sent)
    if tensor.dtype != torch.int64 or tensor.ndim != 1 or len(tensor) > num_steps + 1:
        raise LayoutError(f"latent_step_indices of shape {list(tensor.shape)[:8]} and {tensor.dtype}, not a list of int64")
    return tuple(tensor.tolist())


def _fields_from_wire(sent: WireStepTensors[Leaf], load: Callable[[Leaf], Tensor], num_steps: int) -> StepTensors:
    _check_indices(sent.step_indices, num_steps, "step_indices of step_tensors")
    tensors = {name: _of_steps(load(leaf), len(sent.step_indices)) for name, leaf in sent.tensors.items()}
    return StepTensors(step_indices=sent.step_indices, tensors=tensors)


def _images_from_wire(sent: WireStepImages[Leaf], load: Callable[[Leaf], Tensor], record: SamplingRecord) -> StepImages:
    _check_indices(sent.step_indices, record.num_inference_steps, "step_indices of step_images")
    images = [image for image in (_image(one, load, record) for one in sent.images) if image is not None]
    if len(images) != len(sent.step_indices):
        raise LayoutError(f"{len(images)} step_images for {len(sent.step_indices)} steps")
    return StepImages(step_indices=sent.step_indices, images=tuple(images))


def _of_rank(rank: int, tensor: Tensor, name: str) -> Tensor:
    if tensor.ndim != rank or not tensor.is_floating_point():
        raise LayoutError(f"{name} of shape {list(tensor.shape)[:8]} and {tensor.dtype}, not {rank} dimensions of floats")
    return tensor


def _of_steps(tensor: Tensor, num_steps: int) -> Tensor:
    if tensor.shape[:1] != (num_steps,) or not tensor.is_floating_point():
        raise LayoutError(f"a tensor of shape {list(tensor.shape)[:8]} and {tensor.dtype}, not floats of {num_steps} steps")
    return tensor


def _check_indices(indices: tuple[int, ...], count: int, name: str) -> None:
    if list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < count):
        raise LayoutError(f"{name} that do not ascend within 0..{count - 1}")


def _image(sent: Leaf | bytes | None, load: Callable[[Leaf], Tensor], record: SamplingRecord) -> Tensor | bytes | None:
    wanted = record.image_format
    fits = {"none": sent is None, "png": isinstance(sent, bytes)}.get(wanted, sent is not None and not isinstance(sent, bytes))
    if not fits:
        raise LayoutError(f"generated_output that is not of the image_format {wanted}")
    return sent if sent is None or isinstance(sent, bytes) else _picture(load(sent), record)


def _final(sent: Leaf | None, load: Callable[[Leaf], Tensor], record: SamplingRecord) -> Tensor | None:
    if (sent is None) != (record.image_format != "none"):
        raise LayoutError(f"latents beside the image_format {record.image_format}" if sent is not None else "no latents")
    return None if sent is None else load(sent)


def _picture(tensor: Tensor, record: SamplingRecord) -> Tensor:
    if tensor.shape[:1] not in ((3,), (4,)) or tensor.shape[2:] != (record.height, record.width):
        size = f"{record.height}, {record.width}"
        raise LayoutError(f"generated_output of shape {list(tensor.shape)[:8]}, not [3 or 4, frames, {size}]")
    if record.image_format == "uint8" and tensor.dtype == torch.uint8 and tensor.ndim == 4:
        return tensor
    return _of_rank(4, tensor, "generated_output")
