"""The state of one sample, and its steps.

There are two step functions: `plain_step` is the diffusers pipeline's own step and knows nothing of rollouts; `recorded_step`
follows the request's transitions and keeps what was asked for. A sample takes one of them from start to end. Both are given the
velocity: whether its forward was shared with other samples makes no difference to them.
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
    """What the samples of one request share, on the model's device.

    Attributes:
        plan: The request.
        model: The model that runs it.
        transformer: The denoiser, with the adapter that the request names.
        env: The transformer's fixed arguments.
        fixed: The same, as the forwards of a step take them.
        timesteps: The timesteps as the model takes them.
        dts: Next sigma minus sigma.
        record: How the samples are made.
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
            fixed=model.family.conditioning.fixed_inputs(env, is_guided=plan.guidance.is_active),
            timesteps=timesteps,
            dts=sigmas[1:] - sigmas[:-1],
            record=record,
        )


@dataclass(slots=True, kw_only=True)
class Sample:
    """One running sample.

    Attributes:
        conditioning: What it shares with the other samples of its request.
        seed: The seed of this sample alone.
        latents: x before `step`, raw: neither scaled nor cast for the model.
        step: The next step to take.
        recorder: Keeps what was asked for; None for plain generation.
    """

    conditioning: Conditioning
    seed: int
    latents: Float[Tensor, " *latent"]
    step: int = 0
    recorder: Recorder | None = None

    @classmethod
    def start(cls, conditioning: Conditioning, seed: int) -> Sample:
        """Makes a sample at its initial noise, drawn as the pipeline draws it."""
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
        """How many steps are still to be taken."""
        return self.conditioning.plan.schedule.num_steps - self.step

    @property
    def batch_key(self) -> Hashable:
        """Samples with equal keys may share a forward. Each adapter has a transformer of its own."""
        conditioning = self.conditioning
        return id(conditioning.transformer), conditioning.model.strategy.batch_key(self.next_input())

    def next_input(self) -> StepInput:
        """What the next velocity is a function of."""
        conditioning = self.conditioning
        return StepInput(
            latents=self.latents,
            timestep=conditioning.timesteps[self.step : self.step + 1],
            env=conditioning.env,
            guidance=conditioning.plan.guidance,
            fixed=conditioning.fixed,
        )

    def take_step(self, velocity: Float[Tensor, " *latent"]) -> None:
        """Advances the sample by one step."""
        step: StepFunction = plain_step if self.recorder is None else recorded_step
        step(self, velocity)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What became of the samples of one shared step, by their ids; the others go on.

    Attributes:
        finished: Samples that had their last step.
        failures: What the samples' own steps raised.
        odd_ranks: For each sample that had its last step, the ranks that came to other latents than rank 0.
    """

    finished: dict[int, Sample] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    odd_ranks: dict[int, list[int]] = field(default_factory=dict)


def plain_step(sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
    """Takes one ODE step."""
    sample.latents = ode.step(sample.latents, velocity, sample.conditioning.dts[sample.step])
    sample.step += 1


def recorded_step(sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
    """Takes one step of the request's own dynamics: transition, log-prob, record."""
    plan = sample.conditioning.plan
    assert plan.transitions is not None and sample.recorder is not None
    this = plan.transitions[sample.step]
    mean = dynamics.step_mean(this, sample.latents, velocity, sample.conditioning.dts[sample.step])
    drawn: Tensor | None = None
    if this.is_stochastic:
        drawn = noise.step_noise(sample.seed, sample.step, mean.shape, device=plan.generator_device).to(mean.device)
    next_latents = transition.sample(this, mean, drawn)
    log_prob = transition.log_prob(this, next_latents[None], mean[None], no_const=plan.params.log_prob_no_const)[0]
    sample.recorder.keep_step(velocity=velocity, noise=drawn, mean=mean, log_prob=log_prob)
    sample.latents = next_latents
    sample.step += 1
    sample.recorder.keep_latents(sample.step, next_latents)


StepFunction: TypeAlias = Callable[[Sample, Tensor], None]
