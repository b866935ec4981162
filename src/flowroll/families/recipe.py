"""How the steps of one sample are taken, from its record alone; replay and `Engine.score` share this code.

Owns the way from a `SamplingRecord` to a step's velocity, mean and log-prob. It uses the family's `velocity`, the
transitions of `sampling/dynamics` and the one log-prob, as the engine's loop does, and adds no formula.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.families.base import NO_GUIDANCE, Family, Guidance, StepInput
from flowroll.families.conditioning import ForwardInput
from flowroll.sampling import dynamics, transition
from flowroll.sampling.transition import LogProbForm, Transition
from flowroll.types import SCHEMA_VERSION, DenoisingEnv, SamplingRecord, is_readable_version


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScore:
    """One step of one sample, computed again.

    Attributes:
        velocity: The guided velocity, in the dtype that the family gives to the transition.
        mean: Mean of the next latents, float32; at an ODE step the next latents themselves, in the loop's dtype.
        std: Total std of the transition; 0 at a deterministic step.
        log_prob: Log-prob of the next latents, float32; exactly 0 at a deterministic step.
    """

    velocity: Float[Tensor, " *latent"]
    mean: Float[Tensor, " *latent"]
    std: float
    log_prob: Float[Tensor, ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The steps of one sample.

    Attributes:
        family: The model family, which knows how its transformer is called.
        guidance: How the branches are combined in the step that needs the most.
        guidances: How they are combined in each step.
        transitions: The transitions, one per step.
        sigmas: The T + 1 noise levels, float32 values.
        timesteps: The timesteps as the model takes them, on the model's device.
        dts: Next sigma minus sigma of each step, on the model's device.
        dtype: The dtype of the transformer's inputs.
        form: What counts as the log-prob of a step.
    """

    family: Family
    guidance: Guidance
    guidances: tuple[Guidance, ...]
    transitions: tuple[Transition, ...]
    sigmas: tuple[float, ...]
    timesteps: Float[Tensor, " steps"]
    dts: Float[Tensor, " steps"]
    dtype: torch.dtype
    form: LogProbForm

    @classmethod
    def of(
        cls,
        record: SamplingRecord,
        family: Family,
        *,
        sde_step_indices: Collection[int] | None,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> Recipe:
        """Makes the recipe that a record describes.

        Args:
            record: The record of how the sample was made.
            family: The family that the record names.
            sde_step_indices: The stochastic steps; None: every step follows the record's dynamics.
            device: The transformer's device.
            dtype: The dtype of the transformer's inputs; None: the recorded one. The timesteps keep the recorded dtype in any
                case.

        Raises:
            InvalidRequestError: The record is of another schema, or names a guidance rule that the family does not have, or
                dynamics that flowroll does not have.
        """
        _check_record(record, family)
        sigmas = torch.tensor(record.sigmas, dtype=torch.float32)
        timesteps = torch.tensor(record.timesteps, dtype=torch.float32).to(device)
        on_device = sigmas.to(device)
        guidance = Guidance(rule=record.guidance_rule, scale=record.guidance_scale, embedded=record.embedded_guidance_scale)
        return cls(
            family=family,
            guidance=guidance,
            guidances=family.guidances(
                guidance, record.guidance_scales, record.num_inference_steps, has_negative=guidance.is_active
            ),
            transitions=_transitions(record, sigmas, sde_step_indices),
            sigmas=tuple(sigmas.tolist()),
            timesteps=family.model_timesteps(timesteps, dtype_named(record.timestep_dtype)),
            dts=on_device[1:] - on_device[:-1],
            dtype=dtype or dtype_named(record.model_dtype),
            form=record.log_prob_form,
        )

    def check_env(self, env: DenoisingEnv, where: str = "") -> None:
        """Refuses an environment that lacks a field that the forwards need.

        Raises:
            InvalidRequestError: A branch lacks a field, there is no negative branch although guidance is active, or the model's
                own guidance input is not there although the record has its scale, or the other way round.
        """
        if (self.guidance.embedded is None) != (env.guidance is None):
            rule = "hold the tensor guidance" if env.guidance is None else "hold no guidance"
            given = "none" if env.guidance is None else "a tensor"
            raise InvalidRequestError(
                f"denoising_env must {rule}, as the record has embedded_guidance_scale = {self.guidance.embedded}, got {given}"
                f"{where}; use the env of the same response.",
                field="denoising_env",
            )
        if self.guidance.is_active and env.neg_cond_kwargs is None:
            raise InvalidRequestError(
                f"denoising_env must hold neg_cond_kwargs for a guided rollout, got none{where}; "
                "use the env of the same response.",
                field="denoising_env",
            )
        if self.guidance.is_active and (unequal := self.family.conditioning.unequal(env)):
            raise InvalidRequestError(
                f"denoising_env must hold {unequal.name} of one shape in both branches for {self.family.name}, "
                f"got {[list(value.shape)[:8] for value in unequal.tensors(env)]}{where}; use the env of the same response.",
                field="denoising_env",
            )
        for place, field in self.family.conditioning.missing(env, is_guided=self.guidance.is_active):
            what = f"the tensor {field.name}" if field.is_tensor else field.name
            got = None if place == "guidance" else sorted(getattr(env, place) or {})
            raise InvalidRequestError(
                f"denoising_env must hold {what} in {place} for {self.family.name}, got {got}{where}; "
                "use the env of the same response.",
                field="denoising_env",
            )
        for place, field in self.family.conditioning.misfits(env, is_guided=self.guidance.is_active):
            raise InvalidRequestError(
                f"denoising_env must hold {field.name} for every token of {self.family.embeds_key} in {place}, got another "
                f"number{where}; use the env of the same response.",
                field=f"denoising_env.{place}.{field.name}",
            )

    def evaluate(
        self,
        velocity: Float[Tensor, " *latent"],
        latents: Float[Tensor, " *latent"],
        next_latents: Float[Tensor, " *latent"],
        step: int,
        previous: Float[Tensor, " *latent"] | None = None,
    ) -> StepScore:
        """Computes the log-prob of the recorded next latents for a velocity.

        Args:
            velocity: The guided velocity of the step.
            latents: The recorded latents before the step.
            next_latents: The recorded latents after the step.
            step: The step, counted from 0.
            previous: The clean prediction of the step before; needed exactly if the transition needs it.
        """
        this = self.transitions[step]
        mean = dynamics.step_mean(this, latents, velocity, self.dts[step], previous)
        log_prob = transition.log_prob(this, next_latents[None], mean[None], form=self.form)[0]
        return StepScore(velocity=velocity, mean=mean, std=this.std, log_prob=log_prob)

    def clean_prediction(
        self, velocity: Float[Tensor, " *latent"], latents: Float[Tensor, " *latent"], step: int
    ) -> Float[Tensor, " *latent"]:
        """Computes the clean latents that the velocity of a step predicts, in float32."""
        return transition.clean_prediction(latents, velocity, self.sigmas[step])

    def fixed_inputs(self, env: DenoisingEnv) -> Sequence[ForwardInput]:
        """Returns what all steps of a sample give to the model, and what its first forwards leave for later ones."""
        return self.family.fixed_inputs(env, is_guided=self.guidance.is_active)

    def step_input(
        self, latents: Float[Tensor, " *latent"], step: int, env: DenoisingEnv, fixed: Sequence[ForwardInput] | None = None
    ) -> StepInput:
        """Returns the inputs of one step's velocity.

        Args:
            latents: The recorded latents before the step, on the transformer's device.
            step: The step, counted from 0.
            env: The sample's environment, on the transformer's device.
            fixed: `fixed_inputs` of the environment, where they were made already: for other steps of the same weights.
        """
        guidance = self.guidances[step]
        # What was made for the whole sample does not fit a step with another number of branches, or another scale.
        fits = (guidance.is_active, guidance.embedded) == (self.guidance.is_active, self.guidance.embedded)
        return StepInput(
            latents=latents,
            timestep=self.timesteps[step : step + 1],
            env=guidance.given_in(env, self.guidance),
            guidance=guidance,
            is_first=step == 0,
            fixed=fixed if fits else None,
        )


def _transitions(
    record: SamplingRecord, sigmas: Float[Tensor, " states"], sde_step_indices: Collection[int] | None
) -> tuple[Transition, ...]:
    """Computes the transitions by which a record's steps are taken on its own sigmas; see `Recipe.of`."""
    if record.steps is not None:
        return dynamics.transitions_of(sigmas, record.steps)
    return dynamics.transitions(
        sigmas, sde_type=record.sde_type, noise_level=record.noise_level, sde_step_indices=sde_step_indices
    )


def dtype_named(name: str) -> torch.dtype:
    """Returns the dtype of a name in a record, e.g. "torch.bfloat16".

    Raises:
        InvalidRequestError: There is no dtype of that name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidRequestError(f"dtype must be the name of a torch dtype, got {name!r}; use the record as it was sent.")
    return dtype


def _check_record(record: SamplingRecord, family: Family) -> None:
    if not is_readable_version(record.schema_version):
        raise InvalidRequestError(
            f"schema_version must be at most {SCHEMA_VERSION}, got {record.schema_version}; use a later flowroll.",
            field="schema_version",
        )
    if record.log_prob is not None and record.log_prob_no_const:
        raise InvalidRequestError(
            "log_prob must be null beside log_prob_no_const = true, got a form; use the record as it was sent.",
            field="log_prob",
        )
    if record.guidance_rule not in (NO_GUIDANCE, family.guidance_rule):
        raise InvalidRequestError(
            f"guidance_rule must be {NO_GUIDANCE} or {family.guidance_rule} for {family.name}, got {record.guidance_rule}; "
            "use the record as it was sent.",
            field="guidance_rule",
        )
