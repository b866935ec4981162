"""What a finished sample becomes: a `Rollout`, or the picture of plain generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.sample import Sample
from flowroll.types import DenoisingEnv, GeneratedImage, Number, Rollout, SamplingRecord, branch_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One finished sample.

    Attributes:
        sample: The sample after its last step.
        image: Its picture, on the CPU.
        seconds: Wall time of the loop and the decode.
    """

    sample: Sample
    image: Tensor
    seconds: float


def as_image(plan: RequestPlan, finished: Finished, *, weight_version: str) -> GeneratedImage:
    """Makes the answer of plain generation, on the CPU."""
    return GeneratedImage(
        request_id=plan.request_id,
        prompt=plan.params.prompt,
        seed=finished.sample.seed,
        image=finished.image,
        latents=finished.sample.latents.cpu(),
        sampling=finished.sample.conditioning.record,
        weight_version=weight_version,
        inference_time_s=finished.seconds,
    )


def as_rollout(plan: RequestPlan, finished: Finished, *, weight_version: str, peak_memory_mb: Number) -> Rollout:
    """Makes the answer of a rollout, with what it asked for, on the CPU."""
    recorder, conditioning = finished.sample.recorder, finished.sample.conditioning
    steps = None
    if plan.transitions is not None:
        steps = tuple(step for step, transition in enumerate(plan.transitions) if transition.is_stochastic)
    return Rollout(
        request_id=plan.request_id,
        prompt=plan.params.prompt,
        seed=finished.sample.seed,
        image=finished.image,
        log_probs=None if recorder is None else recorder.stacked_log_probs(),
        sde_step_indices=steps,
        debug_tensors=None if recorder is None else recorder.debug_tensors(),
        denoising_env=conditioning.env.to("cpu") if _returns_env(plan) else None,
        dit_trajectory=None if recorder is None else recorder.trajectory(),
        weight_version=weight_version,
        sampling=conditioning.record,
        inference_time_s=finished.seconds,
        peak_memory_mb=peak_memory_mb,
    )


def record_of(plan: RequestPlan, env: DenoisingEnv) -> SamplingRecord:
    """Describes how the samples of a request are made, with the digests of their environment where that is returned."""
    if not _returns_env(plan):
        return plan.record
    negative = env.neg_cond_kwargs
    return replace(
        plan.record,
        pos_cond_sha256=branch_digest(env.pos_cond_kwargs),
        neg_cond_sha256=None if negative is None else branch_digest(negative),
    )


def _returns_env(plan: RequestPlan) -> bool:
    return plan.params.rollout and plan.params.return_denoising_env
