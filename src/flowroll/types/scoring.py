"""Recorded steps that are to be scored on an engine, and what comes back. Tensors have no batch dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.types.adapters import AdapterRecord
from flowroll.types.params import Number, SamplingParams
from flowroll.types.results import DenoisingEnv, SamplingRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSteps:
    """Some steps of one sample.

    Attributes:
        steps: Which steps, counted from 0.
        latents: x before each of them, as a trajectory holds it; [steps, latent].
        next_latents: x after each of them; as `latents`.
        denoising_env: Of the rollout.
        sampling: Of the rollout.
        sde_step_indices: Of the rollout; None: every step follows the record's dynamics.

    Raises:
        InvalidRequestError: The states are not one per step.
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
            _refuse("steps", "hold at least one step", "none", "name the steps to score")
        for field, tensor in (("latents", self.latents), ("next_latents", self.next_latents)):
            if not tensor.is_floating_point() or tensor.shape[:1] != (len(self.steps),):
                shown = f"the shape {list(tensor.shape)[:8]} and {tensor.dtype}"
                _refuse(
                    field, f"be floats whose first dimension is the {len(self.steps)} steps", shown, "send a state per step"
                )
        if self.latents.shape != self.next_latents.shape:
            shapes = f"{list(self.next_latents.shape)[:8]} beside {list(self.latents.shape)[:8]}"
            _refuse("next_latents", "have the shape of latents", shapes, "send the state after each step")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreParams:
    """One request.

    Attributes:
        samples: What to score, in the order of the answer.
        log_probs_only: Leave means and velocities out of the answer; no forward is run for a step without density.
        suppress_logs: Do not log this request.
        request_id: 1 to 256 characters, echoed; None: the engine makes one.
        min_weight_version: Refuse weights that are older than this version; as in `SamplingParams`.

    Raises:
        InvalidRequestError: There is no sample, or the id or the version breaks its rule.
    """

    samples: tuple[RecordedSteps, ...]
    log_probs_only: bool = False
    suppress_logs: bool = False
    request_id: str | None = None
    min_weight_version: str | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            _refuse("samples", "hold at least one sample", "none", "send the samples to score")
        # Every request has the same rules for these.
        SamplingParams(prompt="", request_id=self.request_id, min_weight_version=self.min_weight_version)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """The steps of one sample, scored; float32, on the CPU.

    Attributes:
        steps: Which steps.
        log_probs: Of the next latents; exactly 0 at deterministic steps.
        stds: Total std of the transitions; 0 at deterministic steps.
        means: Of the next latents; None if only log-probs were asked for.
        velocities: The guided velocities given to the transitions; None if only log-probs were asked for.
        lora: The adapter that scored them: what now has the name that the sample's record gives; None: the model as it is.
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
        request_id: Of the request.
        weight_version: Version of the weights that scored all of it.
        samples: In the order of the request.
        inference_time_s: Wall time, seconds.
    """

    request_id: str
    weight_version: str
    samples: tuple[SampleScores, ...]
    inference_time_s: Number


def _refuse(field: str, rule: str, value: object, remedy: str) -> NoReturn:
    raise InvalidRequestError(f"{field} must {rule}, got {value}; {remedy}.", field=field)
