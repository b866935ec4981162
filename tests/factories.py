"""Synthetic answers for tests of what carries them: every field filled in, shapes and dtypes as the families have them."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from flowroll import DebugTensors, DenoisingEnv, GeneratedImage, Rollout, SamplingRecord, Trajectory
from flowroll.families import FAMILIES, ModelSpec
from flowroll.families.conditioning import REFERENCE_TOKENS, TOKENS
from flowroll.types import ImageFormat, Provenance, ReferenceImage, StepStamp
from flowroll.types.pictures import in_format


def make_rollout(
    *,
    family: str = "qwen_image",
    steps: int = 4,
    height: int = 32,
    width: int = 48,
    text_tokens: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    guided: bool = True,
    seed: int = 0,
    image_format: ImageFormat = "tensor",
    **overrides: Any,
) -> Rollout:
    """A rollout with random content that depends on the arguments alone.

    Args:
        family: A registered family; gives the latents' shape and the env's fields.
        steps: Number of transitions T.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        text_tokens: Length of the prompt's embedding; the negative one is a token shorter.
        dtype: Of the embeddings.
        guided: Whether there is an unconditional branch.
        seed: Of the sample, and of its content.
        image_format: Of the picture.
        **overrides: Fields of `Rollout`, e.g. `debug_tensors=None`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = FAMILIES[family]
    names = {size for field in made.conditioning.fields for size in field.shape or () if isinstance(size, str)}
    spec = ModelSpec(latent_channels=16, vae_scale_factor=8, widths=dict.fromkeys(names, 32))
    record = make_record(family=family, steps=steps, height=height, width=width, guided=guided)
    geometry = made.beside(made.geometry(spec, height=height, width=width), spec, record.images or ())
    latent = geometry.latent_shape

    def branch(tokens: int) -> dict[str, Any]:
        values = {
            field.name: normal(*field.sizes({**spec.widths, TOKENS: tokens})).to(dtype)
            if field.dtype == "model"
            else torch.ones(tokens, dtype=torch.bool)
            for field in made.conditioning.fields
            if field.source == "prompt"
        }
        return {**values, **made.size_fields(geometry, tokens, dtype)}

    sizes = {**spec.widths, REFERENCE_TOKENS: geometry.num_reference_tokens}
    record = dataclasses.replace(record, image_format=image_format)
    pixels = torch.rand((3, 1, height, width), generator=generator)
    fields: dict[str, Any] = {
        "request_id": "request-0",
        "prompt": 'a cat that says "π ≈ 3", 猫',
        "seed": seed,
        "image": None if image_format == "none" else in_format(pixels, image_format),
        "latents": normal(*latent) if image_format == "none" else None,
        "log_probs": normal(steps),
        "sde_step_indices": tuple(range(steps)),
        "debug_tensors": DebugTensors(
            variance_noise=normal(steps, *latent),
            prev_sample_mean=normal(steps, *latent),
            noise_std_dev=normal(steps, 1).abs(),
            model_output=normal(steps, *latent),
        ),
        "denoising_env": DenoisingEnv(
            image_kwargs={one.name: normal(*one.sizes(sizes)).to(dtype) for one in made.conditioning.in_place("image_kwargs")},
            pos_cond_kwargs=branch(text_tokens),
            neg_cond_kwargs=branch(text_tokens - 1) if guided else None,
            guidance=None if record.embedded_guidance_scale is None else torch.tensor(record.embedded_guidance_scale),
        ),
        "dit_trajectory": Trajectory(
            latents=normal(steps + 1, *latent),
            latent_step_indices=tuple(range(steps + 1)),
            timesteps=torch.tensor(record.timesteps),
            sigmas=torch.tensor(record.sigmas),
        ),
        "weight_version": "7",
        "sampling": record,
        "inference_time_s": 1.25,
        "peak_memory_mb": 512.5,
        "provenance": Provenance(
            layout="single",
            strategy="merged",
            versions={"torch": "2.13.0+cpu"},
            start_sha256=_digest(f"start {seed}"),
            noise_sha256=tuple(None if step == 1 else _digest(f"noise {seed} {step}") for step in range(steps)),
        ),
        "first_step": StepStamp(weight_version="7", version_number=7, time_s=1.8e9),
        "last_step": StepStamp(weight_version="7", version_number=7, time_s=1.8e9 + 1),
    }
    return Rollout(**{**fields, **overrides})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_evaluation(**options: Any) -> Rollout:
    """What `rollout=False` gives: the picture alone."""
    absent = ("log_probs", "sde_step_indices", "debug_tensors", "denoising_env", "dit_trajectory")
    return make_rollout(**{**dict.fromkeys(absent), **options})


def make_image(**options: Any) -> GeneratedImage:
    """A generated image with the content of `make_rollout`."""
    rollout = make_rollout(**options)
    assert rollout.dit_trajectory is not None
    return GeneratedImage(
        request_id=rollout.request_id,
        prompt=rollout.prompt,
        seed=rollout.seed,
        image=rollout.image,
        latents=rollout.dit_trajectory.latents[-1],
        sampling=rollout.sampling,
        weight_version=rollout.weight_version,
        inference_time_s=rollout.inference_time_s,
        first_step=rollout.first_step,
        last_step=rollout.last_step,
        left_out=rollout.left_out,
    )


def make_record(
    *, family: str = "qwen_image", steps: int = 4, height: int = 32, width: int = 48, guided: bool = True
) -> SamplingRecord:
    """A record with sigmas that are no round numbers."""
    grid = torch.linspace(1, 0, steps + 1) ** 1.1
    sigmas = tuple(grid.tolist())
    conditioning = FAMILIES[family].conditioning
    image = ReferenceImage(sha256="0" * 64, height=48, width=64)
    return SamplingRecord(
        family=family,
        variant="base",
        sde_type="sde",
        noise_level=0.7,
        log_prob_no_const=False,
        guidance_rule="cfg" if guided else "none",
        guidance_scale=4 if guided else 0.1,
        negative_prompt=" " if guided else None,
        height=height,
        width=width,
        num_inference_steps=steps,
        sigmas=sigmas,
        timesteps=tuple((1000 * grid[:-1]).tolist()),
        generator_device="cpu",
        model_dtype="torch.bfloat16",
        timestep_dtype="torch.float32",
        device="cpu",
        images=(image,) if conditioning.in_place("image_kwargs") else None,
        embedded_guidance_scale=3.5 if conditioning.in_place("guidance") else None,
        rope_axes=(4,) * conditioning.table.ids(0, 0, 0)[0].shape[1] if conditioning.table else None,
    )


def assert_same_answer(a: Any, b: Any, at: str = "answer") -> None:
    """Equal in every field: the same types, the same values, tensors of the same dtype and bits."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape), at
        assert raw_bytes(a) == raw_bytes(b), at
    elif dataclasses.is_dataclass(a):
        assert type(a) is type(b), at
        for field in dataclasses.fields(a):
            assert_same_answer(getattr(a, field.name), getattr(b, field.name), f"{at}.{field.name}")
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), at
        for key in a:
            assert_same_answer(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b), at
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same_answer(left, right, f"{at}[{index}]")
    else:
        assert type(a) is type(b) and a == b, at


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
