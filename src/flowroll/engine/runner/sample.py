"""The state of one sample, and its steps.

There are two step functions: `plain_step` is the step of the diffusers pipeline and has no part in rollouts; `recorded_step`
follows the request's transitions and records what was asked for. A sample uses the same function for all of its steps. Both
are given the velocity, so they do not depend on whether its forward was shared with other samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.recorder import Recorder
from flowroll.families import ForwardInput, StepInput
from flowroll.sampling import dynamics, noise, ode, transition
from flowroll.types import DenoisingEnv, SamplingRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """The data that the samples of one request share, on the model's device.

    Attributes:
        plan: The request.
        model: The model that runs it.
        transformer: The denoiser, with the adapter that the request names.
        env: The transformer's fixed arguments.
        fixed: The same, as the forwards of a step take them.
        timesteps: The timesteps as the model takes them.
        dts: The next sigma minus the sigma, of each step.
        record: The record of how the samples are made.
    """

    plan: RequestPlan
    model: LoadedModel
    transformer: Any
    env: DenoisingEnv
    fixed: Sequence[ForwardInput]
    timesteps: Float[Tensor, " steps"]
    dts: Float[Tensor, " steps"]
    record: SamplingRecord

    @classmethod
    def build(cls, plan: RequestPlan, model: LoadedModel, env: DenoisingEnv, record: SamplingRecord) -> Conditioning:
        """Builds the conditioning, with the schedule on the model's device, where the pipeline also has it.

        Raises:
            InvalidRequestError: The request's adapter is no longer loaded.
        """
        dtype = model.family.timestep_dtype(model.dtype)
        timesteps = model.family.model_timesteps(plan.schedule.timesteps.to(model.device), dtype)
        sigmas = plan.schedule.sigmas.to(model.device)
        return cls(
            plan=plan,
            model=model,
            transformer=model.adapters.transformer(plan.params.lora_name),
            env=env,
            fixed=model.family.conditioning.fixed_inputs(env, is_guided=plan.guidance.is_active),
            timesteps=timesteps,
            dts=sigmas[1:] - sigmas[:-1],
            record=record,
        )


@dataclass(slots=True, kw_only=True)
class Sample:
    """One running sample.

    Attributes:
        conditioning: The data that it shares with the other samples of its request.
        seed: The seed of this sample.
        latents: The latents before `step`, neither scaled nor cast for the model.
        step: The index of the next step.
        previous: The clean prediction of the step before; None where the next step has no use for it.
        recorder: Records what the rollout asked for; None if the sample takes plain ODE steps.
    """

    conditioning: Conditioning
    seed: int
    latents: Float[Tensor, " *latent"]
    step: int = 0
    previous: Float[Tensor, " *latent"] | None = None
    recorder: Recorder | None = None

    @classmethod
    def start(cls, conditioning: Conditioning, seed: int) -> Sample:
        """Creates a sample with its initial noise, drawn as the pipeline draws it."""
        plan, model = conditioning.plan, conditioning.model
        drawn = noise.initial_noise(
            seed, plan.geometry.noise_shape, dtype=model.family.noise_dtype(model.dtype), device=plan.generator_device
        )
        latents = model.family.initial_latents(drawn.to(model.device))
        recorder = None
        if plan.transitions is not None:
            recorder = Recorder(plan=plan)
            recorder.keep_latents(0, latents)
        return cls(conditioning=conditioning, seed=seed, latents=latents, recorder=recorder)

    @property
    def num_steps_left(self) -> int:
        """The number of steps that are still to be taken."""
        return self.conditioning.plan.schedule.num_steps - self.step

    @property
    def batch_key(self) -> Hashable:
        """A key that is equal for samples that may share a forward. Each adapter has its own transformer, so its own keys."""
        conditioning = self.conditioning
        return id(conditioning.transformer), conditioning.model.strategy.batch_key(self.next_input())

    def next_input(self) -> StepInput:
        """Returns the input of the next step's forward."""
        conditioning = self.conditioning
        return StepInput(
            latents=self.latents,
            timestep=conditioning.timesteps[self.step : self.step + 1],
            env=conditioning.env,
            guidance=conditioning.plan.guidance,
            fixed=conditioning.fixed,
        )

    def take_step(self, velocity: Float[Tensor, " *latent"]) -> None:
        """Advances the sample by one step with this velocity."""
        step: StepFunction = plain_step if self.recorder is None else recorded_step
        step(self, velocity)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """The outcome of one shared step, by sample id. Samples that are not listed have further steps to take.

    Attributes:
        finished: The samples that took their last step.
        failures: The errors that were raised in the steps of single samples.
        odd_ranks: For each sample that took its last step, the ranks whose latents differ from rank 0's.
    """

    finished: dict[int, Sample] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    odd_ranks: dict[int, list[int]] = field(default_factory=dict)


def plain_step(sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
    """Takes one ODE step."""
    sample.latents = ode.step(sample.latents, velocity, sample.conditioning.dts[sample.step])
    sample.step += 1


def recorded_step(sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
    """Takes one step of the request's dynamics: samples the transition, computes its log-prob, and records both."""
    plan = sample.conditioning.plan
    assert plan.transitions is not None and sample.recorder is not None
    this = plan.transitions[sample.step]
    mean = dynamics.step_mean(this, sample.latents, velocity, sample.conditioning.dts[sample.step], sample.previous)
    drawn: Tensor | None = None
    if this.is_stochastic:
        drawn = noise.step_noise(sample.seed, sample.step, mean.shape, device=plan.generator_device).to(mean.device)
    next_latents = transition.sample(this, mean, drawn)
    log_prob = transition.log_prob(this, next_latents[None], mean[None], form=plan.params.log_prob_form)[0]
    sample.recorder.keep_step(sample.step, latents=sample.latents, velocity=velocity, noise=drawn, mean=mean, log_prob=log_prob)
    following = plan.transitions[sample.step + 1 : sample.step + 2]
    sample.previous = None
    if following and following[0].needs_previous:
        sigma = plan.record.sigmas[sample.step]
        sample.previous = transition.clean_prediction(sample.latents, velocity, sigma)
    sample.latents = next_latents
    sample.step += 1
    sample.recorder.keep_latents(sample.step, next_latents)


StepFunction: TypeAlias = Callable[[Sample, Tensor], None]
