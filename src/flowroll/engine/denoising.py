"""The steps of one sample.

Two step functions: `plain_step` is the diffusers pipeline's own step and knows nothing of rollouts; `recorded_step` follows the
request's transitions and keeps what was asked for. A sample takes one of them from start to end. Both are given the velocity:
whether its forward was shared with other samples makes no difference to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import RequestPlan
from flowroll.engine.recording import Recorder
from flowroll.families import StepInput
from flowroll.sampling import dynamics, noise, ode, transition
from flowroll.types import DenoisingEnv, SamplingRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingTask:
    """What the samples of one request share in the loop, on the model's device.

    Attributes:
        plan: The request.
        model: The model that runs it.
        transformer: Its denoiser, with the adapter that the request names.
        env: The transformer's fixed arguments.
        timesteps: As the model takes them.
        dts: Next sigma minus sigma.
        record: How its samples are made.
    """

    plan: RequestPlan
    model: LoadedModel
    transformer: Any
    env: DenoisingEnv
    timesteps: Float[Tensor, " steps"]
    dts: Float[Tensor, " steps"]
    record: SamplingRecord

    @classmethod
    def build(cls, plan: RequestPlan, model: LoadedModel, env: DenoisingEnv, record: SamplingRecord) -> DenoisingTask:
        """Puts the schedule on the model's device, where the pipeline has it too.

        Raises:
            InvalidRequestError: The request's adapter is not loaded any more.
        """
        dtype = model.family.timestep_dtype(model.dtype)
        timesteps = model.family.model_timesteps(plan.schedule.timesteps.to(model.device), dtype)
        sigmas = plan.schedule.sigmas.to(model.device)
        return cls(
            plan=plan,
            model=model,
            transformer=model.adapters.transformer(plan.params.lora_name),
            env=env,
            timesteps=timesteps,
            dts=sigmas[1:] - sigmas[:-1],
            record=record,
        )

    def next_input(self, sample: Sample) -> StepInput:
        """What the next velocity of one of its samples is a function of."""
        return StepInput(
            latents=sample.latents,
            timestep=self.timesteps[sample.step : sample.step + 1],
            env=self.env,
            guidance=self.plan.guidance,
        )


@dataclass(slots=True, kw_only=True)
class Sample:
    """The state of one running sample, all of it.

    Attributes:
        seed: Its own seed.
        latents: x before `step`, raw: neither scaled nor cast for the model.
        step: The next step to take.
        recorder: What is kept; None for plain generation.
    """

    seed: int
    latents: Float[Tensor, " *latent"]
    step: int = 0
    recorder: Recorder | None = None


def start(task: DenoisingTask, seed: int) -> Sample:
    """A sample at its initial noise, drawn as the pipeline draws it."""
    plan, model = task.plan, task.model
    drawn = noise.initial_noise(
        seed, plan.geometry.noise_shape, dtype=model.family.noise_dtype(model.dtype), device=plan.generator_device
    )
    latents = model.family.initial_latents(drawn.to(model.device))
    recorder = None
    if plan.transitions is not None:
        recorder = Recorder(plan=plan)
        recorder.keep_latents(0, latents)
    return Sample(seed=seed, latents=latents, recorder=recorder)


def step_function(sample: Sample) -> StepFunction:
    """The one that this sample takes from start to end."""
    return plain_step if sample.recorder is None else recorded_step


def denoise(task: DenoisingTask, sample: Sample, check_interrupt: Callable[[], None]) -> None:
    """Takes a sample through all its steps, alone.

    Args:
        task: The request it belongs to.
        sample: Advanced in place.
        check_interrupt: Called before every step; raises to stop.
    """
    model, take_step = task.model, step_function(sample)
    while sample.step < task.plan.schedule.num_steps:
        check_interrupt()
        (velocity,) = model.strategy.velocities(task.transformer, [task.next_input(sample)])
        take_step(task, sample, velocity)


def plain_step(task: DenoisingTask, sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
    """One ODE step."""
    sample.latents = ode.step(sample.latents, velocity, task.dts[sample.step])
    sample.step += 1


def recorded_step(task: DenoisingTask, sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
    """One step of the request's own dynamics: transition, log-prob, record."""
    assert task.plan.transitions is not None and sample.recorder is not None
    this = task.plan.transitions[sample.step]
    mean = dynamics.step_mean(this, sample.latents, velocity, task.dts[sample.step])
    drawn: Tensor | None = None
    if this.is_stochastic:
        drawn = noise.step_noise(sample.seed, sample.step, mean.shape, device=task.plan.generator_device).to(mean.device)
    next_latents = transition.sample(this, mean, drawn)
    log_prob = transition.log_prob(this, next_latents[None], mean[None], no_const=task.plan.params.log_prob_no_const)[0]
    sample.recorder.keep_step(velocity=velocity, noise=drawn, mean=mean, log_prob=log_prob)
    sample.latents = next_latents
    sample.step += 1
    sample.recorder.keep_latents(sample.step, next_latents)


StepFunction: TypeAlias = Callable[[DenoisingTask, Sample, Tensor], None]
