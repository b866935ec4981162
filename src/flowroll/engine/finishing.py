"""What a finished sample becomes: a `Rollout`, or the picture of plain generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from flowroll.engine.denoising import Sample
from flowroll.engine.plan import RequestPlan
from flowroll.types import DenoisingEnv, GeneratedImage, Number, Rollout, SamplingRecord, branch_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One finished sample.

    Attributes:
        sample: After its last step.
        env: The transformer's fixed arguments.
        image: Its picture, on the CPU.
        seconds: Wall time of the loop and the decode.
    """

    sample: Sample
    env: DenoisingEnv
    image: Tensor
    seconds: float


def as_image(plan: RequestPlan, finished: Finished, *, weight_version: str) -> GeneratedImage:
    """The answer of plain generation, on the CPU."""
    return GeneratedImage(
        request_id=plan.request_id,
        prompt=plan.params.prompt,
        seed=finished.sample.seed,
        image=finished.image,
        latents=finished.sample.latents.cpu(),
        sampling=plan.record,
        weight_version=weight_version,
        inference_time_s=finished.seconds,
    )


def as_rollout(plan: RequestPlan, finished: Finished, *, weight_version: str, peak_memory_mb: Number) -> Rollout:
    """The answer of a rollout, with what it asked for, on the CPU."""
    recorder = finished.sample.recorder
    steps = None
    if plan.transitions is not None:
        steps = tuple(step for step, transition in enumerate(plan.transitions) if transition.is_stochastic)
    wants_env = recorder is not None and plan.params.return_denoising_env
    env = finished.env.to("cpu") if wants_env else None
    return Rollout(
        request_id=plan.request_id,
        prompt=plan.params.prompt,
        seed=finished.sample.seed,
        image=finished.image,
        log_probs=None if recorder is None else recorder.stacked_log_probs(),
        sde_step_indices=steps,
        debug_tensors=None if recorder is None else recorder.debug_tensors(),
        denoising_env=env,
        dit_trajectory=None if recorder is None else recorder.trajectory(),
        weight_version=weight_version,
        sampling=plan.record if env is None else _with_digests(plan.record, env),
        inference_time_s=finished.seconds,
        peak_memory_mb=peak_memory_mb,
    )


def _with_digests(record: SamplingRecord, env: DenoisingEnv) -> SamplingRecord:
    negative = env.neg_cond_kwargs
    return replace(
        record,
        pos_cond_sha256=branch_digest(env.pos_cond_kwargs),
        neg_cond_sha256=None if negative is None else branch_digest(negative),
    )
