"""Recorded steps whose log-probs an engine recomputes, and the results. Tensors have no batch dimension."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowroll.types.adapters import AdapterRecord
from flowroll.types.params import Number, SamplingParams
from flowroll.types.policies import PolicyRecord
from flowroll.types.provenance import Exactness
from flowroll.types.results import DenoisingEnv, SamplingRecord
from flowroll.types.rules import refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSteps:
    """Some steps of one sample.

    Attributes:
        steps: The steps, counted from 0.
        latents: The latents before each step, as a trajectory holds them; [steps, latent].
        next_latents: The latents after each step; [steps, latent].
        denoising_env: The rollout's environment.
        sampling: The rollout's record.
        sde_step_indices: The rollout's steps with a density; None: every step follows the record's dynamics.

    Raises:
        InvalidRequestError: The number of states differs from the number of steps.
    """

    steps: tuple[int, ...]
    # Whatever a caller sends: their shapes, steps and the latents' own, are checked below and by the engine.
    latents: Tensor
    next_latents: Tensor
    denoising_env: DenoisingEnv
    sampling: SamplingRecord
    sde_step_indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            refuse("steps", "hold at least one step", "none", "name the steps to score")
        for field, tensor in (("latents", self.latents), ("next_latents", self.next_latents)):
            if not tensor.is_floating_point() or tensor.shape[:1] != (len(self.steps),):
                shown = f"the shape {list(tensor.shape)[:8]} and {tensor.dtype}"
                refuse(field, f"be floats whose first dimension is the {len(self.steps)} steps", shown, "send a state per step")
        if self.latents.shape != self.next_latents.shape:
            shapes = f"{list(self.next_latents.shape)[:8]} beside {list(self.latents.shape)[:8]}"
            refuse("next_latents", "have the shape of latents", shapes, "send the state after each step")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreParams:
    """One request to recompute log-probs.

    Attributes:
        samples: The recorded steps of each sample, in the order of the answer.
        log_probs_only: Whether to leave means and velocities out of the answer; no forward is run for a step without density.
        suppress_logs: Whether this request is left out of the log.
        request_id: The request's id, 1 to 256 characters, which the answer repeats; None: the engine makes one.
        min_weight_version: The request is refused if the weights are older than this version; see `SamplingParams`.
        policy: The policy, or the adapter, under which all steps are computed, whatever made them. None or "default": the
            weights as they are, with each sample's own adapter.

    Raises:
        InvalidRequestError: There is no sample, or the id, the version or the policy breaks its rule.
    """

    samples: tuple[RecordedSteps, ...]
    log_probs_only: bool = False
    suppress_logs: bool = False
    request_id: str | None = None
    min_weight_version: str | None = None
    policy: str | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            refuse("samples", "hold at least one sample", "none", "send the samples to score")
        # Every request has the same rules for these.
        SamplingParams(prompt="", request_id=self.request_id, min_weight_version=self.min_weight_version, policy=self.policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """The results of one sample's steps; float32, on the CPU.

    Attributes:
        steps: The steps, counted from 0.
        log_probs: Log-probs of the next latents; exactly 0 at deterministic steps.
        stds: Total std of the transitions; 0 at deterministic steps.
        means: Means of the next latents; None if only log-probs were requested.
        velocities: The guided velocities given to the transitions; None if only log-probs were requested.
        lora: The adapter that was used: the one that now has the name in the sample's record, or that of the policy. None: no
            adapter.
    """

    steps: tuple[int, ...]
    log_probs: Float[Tensor, " steps"]
    stds: Float[Tensor, " steps"]
    means: Float[Tensor, " steps *latent"] | None
    velocities: Float[Tensor, " steps *latent"] | None
    lora: AdapterRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreAnswer:
    """The answer to `ScoreParams`.

    Attributes:
        request_id: Id of the request.
        weight_version: Version of the weights with which all steps were computed.
        samples: The results of each sample, in the order of the request.
        inference_time_s: Wall time in seconds.
        policy: The policy under which they were computed; None: the default, or an adapter that is no policy.
        exactness: "fast" for an engine in the mode that is not exact.
    """

    request_id: str
    weight_version: str
    samples: tuple[SampleScores, ...]
    inference_time_s: Number
    policy: PolicyRecord | None = None
    exactness: Exactness = "exact"
