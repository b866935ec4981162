"""Makes the answer of a finished sample: a `Rollout`, or the `GeneratedImage` of plain generation.

It owns the rule that every number in an answer is finite: a sample with NaN or infinity gives an error, never a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.sample import Sample
from flowroll.errors import EngineError
from flowroll.types import (
    DenoisingEnv,
    Exactness,
    GeneratedImage,
    Number,
    Provenance,
    Rollout,
    SamplingRecord,
    StepImages,
    StepStamp,
    all_finite,
    env_digests,
)
from flowroll.types.pictures import in_format


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A finished sample with its picture.

    Attributes:
        sample: The sample after its last step.
        image: The picture of the sample, on the CPU; None where the request asks for no picture.
        seconds: The wall time from the sample's start to the end of its decoding, in seconds.
        first_step: When its first step was taken, and by which weights.
        last_step: When its last step was taken, and by which weights.
    """

    sample: Sample
    image: Tensor | None
    seconds: float
    first_step: StepStamp | None
    last_step: StepStamp | None


def check_encoded(env: DenoisingEnv) -> None:
    """Refuses an environment in which an encoder left NaN or infinity, before any step is taken with it.

    Raises:
        EngineError: A tensor is not finite; the error names it.
    """
    for name, tensor in env.tensors():
        if all_finite(tensor):
            continue
        if name.startswith("image_kwargs"):
            raise EngineError(
                f"{name} of the images must be finite, got NaN or infinity from the VAE; check its weights and its dtype."
            )
        prompt = "negative prompt" if name.startswith("neg_cond_kwargs") else "prompt"
        raise EngineError(
            f"{name} of the {prompt} must be finite, got NaN or infinity from the text encoder; check its "
            "weights, or send another text."
        )


def check_denoised(plan: RequestPlan, sample: Sample) -> None:
    """Refuses a trajectory that left the range of float32, before it is decoded.

    The copies of the sample's recorder must have arrived in host memory.

    Raises:
        EngineError: A tensor is not finite; the error names the sample and the tensor.
    """
    log_probs = [] if sample.recorder is None else [("log_probs", sample.recorder.log_probs())]
    level = "" if sample.recorder is None else f"noise_level {plan.params.noise_level} and "
    for name, tensor in (("latents", sample.latents), *log_probs):
        if not all_finite(tensor):
            raise EngineError(
                f"{name} of the sample with seed {sample.seed} must stay finite, got NaN or infinity at {level}guidance scale "
                f"{plan.guidance.scale}; lower the noise level or the guidance scale, or check the weights."
            )


def _check_recorded(seed: int, rollout: Rollout) -> None:
    """Refuses recorded tensors with NaN or infinity, which may not show in the final latents."""

    def recorded() -> Iterator[tuple[str, Tensor]]:
        if rollout.step_tensors is not None:
            yield from ((f"step_tensors.{name}", tensor) for name, tensor in rollout.step_tensors.tensors.items())
        for part in ("debug_tensors", "dit_trajectory"):
            record = getattr(rollout, part)
            for field in () if record is None else fields(record):
                value = getattr(record, field.name)
                if isinstance(value, Tensor):
                    yield f"{part}.{field.name}", value

    for name, tensor in recorded():
        if not all_finite(tensor):
            raise EngineError(f"{name} of the sample with seed {seed} must be finite, got NaN or infinity; check the weights.")


def as_image(plan: RequestPlan, finished: Finished, *, weight_version: str, exactness: Exactness) -> GeneratedImage:
    """Makes the answer of plain generation, on the CPU."""
    assert finished.image is not None
    return GeneratedImage(
        request_id=plan.request_id,
        prompt=plan.params.prompt,
        seed=finished.sample.seed,
        image=finished.image,
        latents=finished.sample.latents.cpu(),
        sampling=finished.sample.record,
        weight_version=weight_version,
        inference_time_s=finished.seconds,
        first_step=finished.first_step,
        last_step=finished.last_step,
        exactness=exactness,
    )


def as_rollout(
    plan: RequestPlan, finished: Finished, *, weight_version: str, peak_memory_mb: Number, maker: Provenance
) -> Rollout:
    """Makes the answer of a rollout with the tensors that it asked for, on the CPU.

    Args:
        plan: The request.
        finished: The sample.
        weight_version: The version of the weights that made it.
        peak_memory_mb: Peak memory in MiB.
        maker: What the engine says of itself; the digests of the sample are added.

    Raises:
        EngineError: A recorded tensor holds NaN or infinity.
    """
    recorder, conditioning = finished.sample.recorder, finished.sample.conditioning
    steps = None
    if plan.transitions is not None:
        steps = tuple(step for step in plan.steps if plan.transitions[step].is_stochastic)
    rollout = Rollout(
        request_id=plan.request_id,
        prompt=plan.params.prompt,
        seed=finished.sample.seed,
        image=None if finished.image is None else in_format(finished.image, plan.record.image_format),
        latents=finished.sample.latents.cpu() if finished.image is None else None,
        log_probs=None if recorder is None else recorder.log_probs(),
        sde_step_indices=steps,
        debug_tensors=None if recorder is None else recorder.debug_tensors(),
        denoising_env=conditioning.returned_env,
        dit_trajectory=None if recorder is None else recorder.trajectory(),
        step_tensors=None if recorder is None else recorder.step_tensors(),
        step_images=_step_images(plan, finished),
        weight_version=weight_version,
        sampling=finished.sample.record,
        inference_time_s=finished.seconds,
        peak_memory_mb=peak_memory_mb,
        provenance=maker
        if recorder is None
        else replace(maker, start_sha256=recorder.start_sha256(), noise_sha256=recorder.noise_sha256()),
        first_step=finished.first_step,
        last_step=finished.last_step,
    )
    _check_recorded(finished.sample.seed, rollout)
    return rollout


def _step_images(plan: RequestPlan, finished: Finished) -> StepImages | None:
    recorder, steps = finished.sample.recorder, plan.params.decode_step_indices
    if recorder is None or steps is None:
        return None
    ordered = tuple(sorted(steps))
    images = tuple(in_format(recorder.pictures[step], plan.record.image_format) for step in ordered)
    return StepImages(step_indices=ordered, images=images)


def record_of(plan: RequestPlan, env: DenoisingEnv | None) -> SamplingRecord:
    """Returns the record of how a request's samples are made; for a rollout with the digests of its environment."""
    if env is None:
        return plan.record
    positive, negative = env_digests(env)
    return replace(plan.record, pos_cond_sha256=positive, neg_cond_sha256=negative)
