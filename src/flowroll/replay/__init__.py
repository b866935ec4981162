"""The trainer's side: recorded steps re-run and scored with gradients, audited, and turned into losses. torch alone.

`log_prob` and `score` replay rollouts; `micro_batches` does so a few pairs at a time, for training; `velocities` evaluates the
policy at latents of the caller's own; `audit` says whether a replay is exact, and if not, why. The forwards and the log-prob
are those of the engine, through `families/` and `sampling/`.
"""

from flowroll.exact import compile_blocks
from flowroll.families.alignment import align_weights
from flowroll.families.checksums import adapter_checksum, tensor_checksums, weights_checksum
from flowroll.replay.audit import AuditReport, RolloutAudit, StepAudit, audit
from flowroll.replay.causes import Cause
from flowroll.replay.forward import velocities
from flowroll.replay.losses import (
    clipped_loss,
    divergences,
    group_advantages,
    importance_weights,
    masked_loss,
    nft_loss,
    normalised_ratio,
    optimality,
    ratio,
)
from flowroll.replay.scoring import MicroBatch, Scores, log_prob, micro_batches, score

__all__ = [
    "AuditReport",
    "Cause",
    "MicroBatch",
    "RolloutAudit",
    "Scores",
    "StepAudit",
    "adapter_checksum",
    "align_weights",
    "audit",
    "clipped_loss",
    "compile_blocks",
    "divergences",
    "group_advantages",
    "importance_weights",
    "log_prob",
    "masked_loss",
    "micro_batches",
    "nft_loss",
    "normalised_ratio",
    "optimality",
    "ratio",
    "score",
    "tensor_checksums",
    "velocities",
    "weights_checksum",
]
