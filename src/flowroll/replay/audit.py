"""Whether a replay is exact, step by step, and why not where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flowroll.errors import InvalidRequestError
from flowroll.families import StepScore, Transformer
from flowroll.families.recipe import dtype_named
from flowroll.replay.causes import Cause, Encode, Evidence, causes_of, grid_causes
from flowroll.replay.scoring import run_pair
from flowroll.replay.sources import Place, Source, check_any, place_of, source_of
from flowroll.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAudit:
    """One step, over all audited rollouts that have it.

    Attributes:
        step: Which.
        num_samples: How many rollouts were replayed at this step.
        is_exact: Whether every log-prob, and every velocity that was recorded, has the recorded bits.
        max_ratio_error: Largest |ratio - 1|.
        mean_ratio_error: Mean |ratio - 1|.
        max_velocity_error: Largest |difference| of an element of the velocity; None: no debug tensors.
        mean_velocity_error: Mean |difference|; None: no debug tensors.
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
    """One rollout.

    Attributes:
        index: Its place among the rollouts.
        is_exact: Whether nothing differs.
        causes: What differs from what made it; empty where it is exact.
    """

    index: int
    is_exact: bool
    causes: tuple[Cause, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The audit of some rollouts; `str` says it in plain words.

    Attributes:
        steps: Per step.
        rollouts: Per rollout.
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
            affected = [str(one.index) for one in self.rollouts if cause in one.causes]
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
        transformer: With the weights that should have made them; its own dtype is used.
        rollouts: With env and trajectory; debug tensors let the audit tell more causes apart.
        weight_version: Of the transformer's weights; None: not compared.
        encode: Encodes a rollout's prompts again, to tell a wrong env from wrong weights; None: the env is compared with the
            digests in the record alone, which rollouts of older versions lack.
        device: Of the transformer; None: that of its first weight.

    Returns:
        The report. Every step is replayed whose states the trajectory holds, deterministic ones too.

    Raises:
        InvalidRequestError: A rollout cannot be replayed at all; the message names the remedy.
    """
    check_any(rollouts)
    audits: list[RolloutAudit] = []
    pairs: dict[int, list[_Pair]] = {}
    for index, rollout in enumerate(rollouts):
        place = place_of(transformer, [rollout], device, _dtype_of(transformer, rollout))
        source = source_of(index, rollout, place)
        with torch.no_grad():
            scores = _replayed(transformer, source, place)
            compared = {step: _compared(rollout, step, score) for step, score in scores.items()}
            exact = all(pair.is_exact for pair in compared.values())
            evidence = Evidence(
                source=source,
                scores=scores,
                transformer=transformer,
                place=place,
                weight_version=weight_version,
                encode=encode,
            )
            # A grid that contradicts itself is reported even where the ratio happens to be 1.
            causes = tuple(grid_causes(source) if exact else causes_of(evidence))
        audits.append(RolloutAudit(index=index, is_exact=exact and not causes, causes=causes))
        for step, pair in compared.items():
            pairs.setdefault(step, []).append(pair)
    return AuditReport(steps=tuple(_step_audit(step, pairs[step]) for step in sorted(pairs)), rollouts=tuple(audits))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """One step of one rollout: |ratio - 1|, and the largest and the mean |difference| of the velocity."""

    is_exact: bool
    ratio_error: float
    velocity_errors: tuple[float, float] | None


def _dtype_of(transformer: Transformer, rollout: Rollout) -> torch.dtype:
    """The dtype to replay in: the recorded one, where the transformer has weights in it, else the transformer's."""
    recorded = dtype_named(rollout.sampling.model_dtype)
    weights = transformer.parameters() if isinstance(transformer, nn.Module) else iter(())
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    return recorded if not dtypes or recorded in dtypes else next(iter(dtypes))


def _replayed(transformer: Transformer, source: Source, place: Place) -> dict[int, StepScore]:
    steps = [step for step in range(source.num_steps) if source.has_states(step)]
    if not steps:
        shown = f"the states {list(source.trajectory.latent_step_indices)} in rollout {source.index}"
        raise InvalidRequestError(
            f"dit_trajectory must hold two states in a row, got {shown}; roll out without return_step_indices.",
            field="dit_trajectory",
        )
    env = source.env_on(place)
    return {step: run_pair(transformer, source, step, place, env) for step in steps}


def _compared(rollout: Rollout, step: int, score: StepScore) -> _Pair:
    assert rollout.log_probs is not None
    new, old, debug = score.log_prob.cpu(), rollout.log_probs[step], rollout.debug_tensors
    same_velocity, errors = True, None
    if debug is not None:
        difference = (score.velocity.float().cpu() - debug.model_output[step]).abs().nan_to_num(nan=math.inf)
        same_velocity = not bool(difference.any())
        errors = (difference.max().item(), difference.mean().item())
    return _Pair(
        is_exact=same_velocity and torch.equal(new, old),
        # Reported, not refused: a NaN is what an audit is to find.
        ratio_error=(torch.exp(new - old) - 1).abs().nan_to_num(nan=math.inf).item(),
        velocity_errors=errors,
    )


def _step_audit(step: int, pairs: Sequence[_Pair]) -> StepAudit:
    velocity = [pair.velocity_errors for pair in pairs if pair.velocity_errors is not None]
    return StepAudit(
        step=step,
        num_samples=len(pairs),
        is_exact=all(pair.is_exact for pair in pairs),
        max_ratio_error=max(pair.ratio_error for pair in pairs),
        mean_ratio_error=sum(pair.ratio_error for pair in pairs) / len(pairs),
        max_velocity_error=max(most for most, _ in velocity) if velocity else None,
        mean_velocity_error=sum(mean for _, mean in velocity) / len(velocity) if velocity else None,
    )
