"""Says whether a replay is exact, step by step, and why it is not where it differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from flowroll.errors import InvalidRequestError
from flowroll.families import StepScore, Transformer
from flowroll.families.recipe import dtype_named
from flowroll.replay.causes import Cause, Diagnosis, Encode, fast_causes, grid_causes
from flowroll.replay.precision import forward_dtypes, noticed_autocast
from flowroll.replay.sources import Source, check_any, place_of, source_of
from flowroll.replay.steps import prepare, run_pair
from flowroll.types import Rollout, SamplingRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAudit:
    """Tells what was found at one step of all audited rollouts that have it.

    Attributes:
        step: The step.
        num_samples: How many rollouts were replayed at this step.
        is_exact: Whether every log-prob, and every velocity that was recorded, has the recorded bits.
        max_ratio_error: Largest |ratio - 1|.
        mean_ratio_error: Mean |ratio - 1|.
        max_velocity_error: Largest |difference| of an element of the velocity; None without debug tensors.
        mean_velocity_error: Mean |difference| of the elements; None without debug tensors.
    """

    step: int
    num_samples: int
    is_exact: bool
    max_ratio_error: float
    mean_ratio_error: float
    max_velocity_error: float | None
    mean_velocity_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutAudit:
    """Tells what was found in one rollout.

    Attributes:
        causes: What differs from what made the rollout; empty where it is exact.
    """

    causes: tuple[Cause, ...]

    @property
    def is_exact(self) -> bool:
        """Whether nothing differs."""
        return not self.causes


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Holds the audit of some rollouts; `str` says it in plain words.

    Attributes:
        steps: What was found at each step.
        rollouts: What was found in each rollout.
    """

    steps: tuple[StepAudit, ...]
    rollouts: tuple[RolloutAudit, ...]

    @property
    def is_exact(self) -> bool:
        """Whether the ratio is exactly 1 everywhere and nothing contradicts the rollouts."""
        return all(rollout.is_exact for rollout in self.rollouts)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Every distinct cause."""
        return tuple(dict.fromkeys(cause for rollout in self.rollouts for cause in rollout.causes))

    def __str__(self) -> str:
        pairs = sum(step.num_samples for step in self.steps)
        if self.is_exact:
            return f"exact: the ratio is 1 at all {pairs} steps of {len(self.rollouts)} rollout(s)"
        lines = [f"not exact: {sum(not one.is_exact for one in self.rollouts)} of {len(self.rollouts)} rollout(s) differ"]
        for cause in self.causes:
            affected = [str(index) for index, one in enumerate(self.rollouts) if cause in one.causes]
            lines.append(f"- {cause.message} (rollout {', '.join(affected)})")
        return "\n".join(lines)


def audit(
    transformer: Transformer,
    rollouts: Sequence[Rollout],
    *,
    weight_version: str | None = None,
    encode: Encode | None = None,
    device: torch.device | str | None = None,
) -> AuditReport:
    """Replays rollouts with the weights that should have made them, and names what differs.

    Args:
        transformer: A transformer with the weights that should have made the rollouts; its own dtype is used.
        rollouts: Rollouts with env and trajectory; debug tensors let the audit tell more causes apart.
        weight_version: Version of the transformer's weights; None: it is not compared.
        encode: Encodes a rollout's prompts again, to tell a wrong env from wrong weights; None: the env is compared with the
            digests in the record alone, which rollouts of older versions lack. It is not called for a rollout that was given
            embeddings, of which the text is not known.
        device: The transformer's device; None: that of its first weight.

    Returns:
        The report. Every step whose states the trajectory holds is replayed, deterministic steps too.

    Raises:
        InvalidRequestError: A rollout cannot be replayed at all; the message names the remedy.
    """
    check_any(rollouts)
    audits: list[RolloutAudit] = []
    found: dict[int, list[StepAudit]] = {}
    for index, rollout in enumerate(rollouts):
        place = place_of(transformer, [rollout], device, _dtype_of(transformer, rollout))
        source = source_of(index, rollout, place)
        with torch.no_grad():
            shared = prepare(source, place)
            with noticed_autocast(transformer, place.device) as autocast:
                scores = {step: run_pair(transformer, source, step, place, shared) for step in _steps_of(source)}
            steps = [_compare(rollout, step, score) for step, score in scores.items()]
            diagnosis = Diagnosis(
                source=source,
                scores=scores,
                transformer=transformer,
                place=place,
                autocast=frozenset(autocast),
                weight_version=weight_version,
                encode=None if _was_given_embeds(rollout.sampling) else encode,
            )
            # A grid that contradicts itself, or a fast engine, is reported even where the ratio happens to be 1.
            own = [*fast_causes(source), *grid_causes(source)]
            causes = own if all(one.is_exact for one in steps) else diagnosis.causes()
            audits.append(RolloutAudit(causes=tuple(causes)))
        for one in steps:
            found.setdefault(one.step, []).append(one)
    return AuditReport(steps=tuple(_merged(found[step]) for step in sorted(found)), rollouts=tuple(audits))


def _dtype_of(transformer: Transformer, rollout: Rollout) -> torch.dtype:
    """Returns the recorded dtype where the transformer's forward has weights in it, else the transformer's."""
    recorded = dtype_named(rollout.sampling.model_dtype)
    dtypes = forward_dtypes(transformer) if isinstance(transformer, nn.Module) else set()
    return recorded if not dtypes or recorded in dtypes else next(iter(dtypes))


def _was_given_embeds(record: SamplingRecord) -> bool:
    return (record.prompt_embeds_sha256, record.negative_prompt_embeds_sha256) != (None, None)


def _steps_of(source: Source) -> list[int]:
    """Returns the steps whose states the trajectory holds; at least one."""
    if steps := [step for step in range(source.num_steps) if source.has_states(step)]:
        return steps
    shown = f"the states {list(source.trajectory.latent_step_indices)} in rollout {source.index}"
    raise InvalidRequestError(
        f"dit_trajectory must hold two states in a row, got {shown}; roll out without return_step_indices.",
        field="dit_trajectory",
    )


def _compare(rollout: Rollout, step: int, score: StepScore) -> StepAudit:
    """Audits one step of one rollout. A NaN is reported as infinitely far, since it is what an audit is to find."""
    assert rollout.log_probs is not None
    new, old, off = score.log_prob.cpu(), rollout.log_probs[step], None
    error = (torch.exp(new - old) - 1).abs().nan_to_num(nan=math.inf).item()
    if rollout.debug_tensors is not None:
        off = (score.velocity.float().cpu() - rollout.debug_tensors.model_output[step]).abs().nan_to_num(nan=math.inf)
    return StepAudit(
        step=step,
        num_samples=1,
        is_exact=torch.equal(new, old) and (off is None or not off.any()),
        max_ratio_error=error,
        mean_ratio_error=error,
        max_velocity_error=None if off is None else off.max().item(),
        mean_velocity_error=None if off is None else off.mean().item(),
    )


def _merged(audits: Sequence[StepAudit]) -> StepAudit:
    """Merges the audits of one step of single rollouts."""
    most = [one.max_velocity_error for one in audits if one.max_velocity_error is not None]
    means = [one.mean_velocity_error for one in audits if one.mean_velocity_error is not None]
    return StepAudit(
        step=audits[0].step,
        num_samples=len(audits),
        is_exact=all(one.is_exact for one in audits),
        max_ratio_error=max(one.max_ratio_error for one in audits),
        mean_ratio_error=fmean(one.mean_ratio_error for one in audits),
        max_velocity_error=max(most, default=None),
        mean_velocity_error=fmean(means) if means else None,
    )
