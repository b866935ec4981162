"""The state of one sample, and its steps.

There are two step functions: `plain_step` is the step of the diffusers pipeline and has no part in rollouts; `recorded_step`
follows the request's transitions and records what was asked for. A sample uses the same function for all of its steps. Both
are given the velocity, so they do not depend on whether its forward was shared with other samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.recorder import Recorder
from flowroll.engine.runner.streams import Mark
from flowroll.engine.starts import PlannedSample
from flowroll.families import ForwardInput, Guidance, StepInput
from flowroll.sampling import dynamics, noise, ode, transition
from flowroll.types import DenoisingEnv, Number, SamplingRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """The data that the samples of one request share, on the model's device.

    Attributes:
        plan: The request.
        model: The model that runs it.
        transformer: The denoiser, with the adapter that the request names.
        env: The transformer's fixed arguments.
        fixed: The same with the guidance of each kind of step, and as the forwards of such a step take them.
        timesteps: The timesteps as the model takes them.
        numbers: The timesteps of the schedule, as numbers of the host.
        dts: The next sigma minus the sigma, of each step.
        record: The record of how the samples are made.
        ready: The mark after which all of its tensors are there.
        returned_env: The environment in the host's memory, for the answers of all samples; None where no answer has it.
    """

    plan: RequestPlan
    model: LoadedModel
    transformer: Any
    env: DenoisingEnv
    fixed: Mapping[Guidance, tuple[DenoisingEnv, Sequence[ForwardInput]]]
    timesteps: Float[Tensor, " steps"]
    numbers: tuple[float, ...]
    dts: Float[Tensor, " steps"]
    record: SamplingRecord
    ready: Mark | None
    returned_env: DenoisingEnv | None = None

    @classmethod
    def build(
        cls,
        plan: RequestPlan,
        model: LoadedModel,
        env: DenoisingEnv,
        record: SamplingRecord,
        *,
        returned_env: DenoisingEnv | None = None,
    ) -> Conditioning:
        """Builds the conditioning, with the schedule on the model's device, where the pipeline also has it.

        Raises:
            InvalidRequestError: The request's adapter is no longer loaded.
        """
        dtype = model.family.timestep_dtype(model.dtype)
        timesteps = model.family.model_timesteps(plan.schedule.timesteps.to(model.device), dtype)
        sigmas = plan.schedule.sigmas.to(model.device)
        fixed, dts = _fixed_inputs(plan, model, env), sigmas[1:] - sigmas[:-1]
        return cls(
            plan=plan,
            model=model,
            transformer=model.adapters.transformer(plan.params.lora_name, plan.params.policy),
            env=env,
            fixed=fixed,
            timesteps=timesteps,
            numbers=tuple(plan.schedule.timesteps.tolist()),
            dts=dts,
            record=record,
            ready=model.streams.mark(),
            returned_env=returned_env,
        )

    @property
    def num_bytes(self) -> int:
        """The bytes of the transformer's arguments; samples and requests may share some of them."""
        return sum(tensor.nbytes for _, tensor in self.env.tensors())

    def handed_over(self) -> Conditioning:
        """Has the current stream come after the one on which this was made; returns itself."""
        envs = [self.env, *(env for env, _ in self.fixed.values())]
        leaves = [self.timesteps, self.dts, *tree_leaves([list(inputs) for _, inputs in self.fixed.values()])]
        leaves += [tensor for env in envs for _, tensor in env.tensors()]
        self.model.streams.after(self.ready, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        return self


def _fixed_inputs(
    plan: RequestPlan, model: LoadedModel, env: DenoisingEnv
) -> dict[Guidance, tuple[DenoisingEnv, Sequence[ForwardInput]]]:
    """Makes what the steps of each guidance take; those that differ in the scale of the branches alone share it."""
    made: dict[tuple[bool, Number | None], tuple[DenoisingEnv, Sequence[ForwardInput]]] = {}
    for guidance in dict.fromkeys(plan.guidances):
        key = guidance.is_active, guidance.embedded
        if key not in made:
            given = guidance.given_in(env, plan.guidance)
            made[key] = given, model.family.fixed_inputs(given, is_guided=guidance.is_active)
    return {guidance: made[guidance.is_active, guidance.embedded] for guidance in plan.guidances}


@dataclass(slots=True, kw_only=True)
class Sample:
    """One running sample.

    Attributes:
        conditioning: The data that it shares with the other samples of its request.
        planned: What the sample is drawn from.
        latents: The latents before `step`, neither scaled nor cast for the model.
        step: The index of the next step.
        previous: The clean prediction of the step before; None where the next step has no use for it.
        recorder: Records what the rollout asked for; None if the sample takes plain ODE steps.
        velocity: The velocity of the step at which the sample forks, for its children; None before that.
        done: The mark of its last step.
        decoded: What the VAE made of the finished sample, where it was decoded beside another one.
    """

    conditioning: Conditioning
    planned: PlannedSample
    latents: Float[Tensor, " *latent"]
    step: int
    previous: Float[Tensor, " *latent"] | None = None
    recorder: Recorder | None = None
    velocity: Float[Tensor, " *latent"] | None = None
    done: Mark | None = None
    decoded: Float[Tensor, " 1 colors height width"] | None = None

    @classmethod
    def start(cls, conditioning: Conditioning, planned: PlannedSample) -> Sample:
        """Creates a sample with the latents that the request gives, or with initial noise, drawn as the pipeline draws it."""
        plan, model = conditioning.plan, conditioning.model
        if planned.init_seed is None:
            given = plan.start_latents(planned)
            assert given is not None
            # Copied, because a row of a stack has an arbitrary address, and bits can depend on the address.
            return cls._at(conditioning, planned, given.to(model.device, copy=True))
        drawn = noise.initial_noise(
            planned.init_seed,
            plan.geometry.noise_shape,
            dtype=model.family.noise_dtype(model.dtype),
            device=plan.generator_device,
        )
        return cls._at(conditioning, planned, model.family.initial_latents(noise.moved(drawn, model.device)))

    @classmethod
    def _at(cls, conditioning: Conditioning, planned: PlannedSample, latents: Float[Tensor, " *latent"]) -> Sample:
        """Creates a sample before the first step of its request, and records its latents."""
        plan = conditioning.plan
        recorder = None
        if plan.transitions is not None:
            recorder = Recorder(plan, conditioning.model.streams, stop=_end_of(plan, planned))
            # As the states of a record lie in memory: the order of a sum's terms depends on it.
            latents = latents.contiguous()
            recorder.keep_latents(plan.steps.start, latents)
        return cls(conditioning=conditioning, planned=planned, latents=latents, step=plan.steps.start, recorder=recorder)

    @property
    def seed(self) -> int:
        """The seed of the sample."""
        return self.planned.seed

    @property
    def record(self) -> SamplingRecord:
        """The record of how this sample is made."""
        planned, is_rollout = self.planned, self.recorder is not None
        return replace(
            self.conditioning.record,
            init_seed=planned.init_seed,
            sde_seed=planned.sde_seed if is_rollout else None,
            latents_sha256=planned.latents_sha256,
            branches=planned.branches or None,
        )

    @property
    def num_steps_left(self) -> int:
        """The number of steps that are still to be taken."""
        return self.conditioning.plan.steps.stop - self.step

    @property
    def batch_key(self) -> Hashable:
        """A key that is equal for samples that may share a forward. Each adapter has its own transformer, so its own keys."""
        conditioning = self.conditioning
        return id(conditioning.transformer), conditioning.model.strategy.batch_key(self.next_input())

    def next_input(self) -> StepInput:
        """Returns the input of the next step's forward."""
        conditioning = self.conditioning
        guidance = conditioning.plan.guidances[self.step]
        env, fixed = conditioning.fixed[guidance]
        return StepInput(
            latents=self.latents,
            timestep=conditioning.timesteps[self.step : self.step + 1],
            env=env,
            guidance=guidance,
            is_first=self.step == 0,
            fixed=fixed,
            geometry=conditioning.plan.geometry,
            number=conditioning.numbers[self.step],
        )

    @property
    def is_at_fork(self) -> bool:
        """Whether the next step is not the sample's own, but that of its children."""
        plan = self.conditioning.plan
        return self.step == _end_of(plan, self.planned) < plan.steps.stop

    def branch(self, planned: PlannedSample) -> Sample:
        """Returns a child, which has taken the step at which this sample forks, with noise of its own.

        Args:
            planned: One of the children that the plan has for this sample.
        """
        assert self.velocity is not None and self.recorder is not None
        recorder = self.recorder.branch(self.step, stop=_end_of(self.conditioning.plan, planned))
        child = replace(self, planned=planned, recorder=recorder, velocity=None)
        child.take_step(self.velocity)
        return child

    def take_step(self, velocity: Float[Tensor, " *latent"]) -> None:
        """Advances the sample by one step with this velocity."""
        step: StepFunction = plain_step if self.recorder is None else recorded_step
        step(self, velocity)
        if not self.num_steps_left:
            self.done = self.conditioning.model.streams.mark()


def _end_of(plan: RequestPlan, planned: PlannedSample) -> int:
    """Returns the step before which a sample ends: that of its fork, or the end of the request's."""
    level = len(planned.branches)
    return plan.forks[level][0] if level < len(plan.forks) else plan.steps.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """The outcome of one shared step, by sample id. Samples that are not listed have further steps to take.

    Attributes:
        finished: The samples that took their last step.
        forked: The samples that have come to a fork, and wait for their children to start.
        failures: The errors that were raised in the steps of single samples.
        odd_ranks: For each sample that took its last step, the ranks whose latents differ from rank 0's.
    """

    finished: dict[int, Sample] = field(default_factory=dict)
    forked: dict[int, Sample] = field(default_factory=dict)
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
        seed = sample.planned.noise_seed
        drawn = noise.moved(noise.step_noise(seed, sample.step, mean.shape, device=plan.generator_device), mean.device)
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
