"""Policies: named sets of weights that an engine keeps beside those that it was last given, such as an old policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

# The weights that the engine was last given; it always exists.
DEFAULT_POLICY = "default"
PolicyKind: TypeAlias = Literal["weights", "adapter"]
Number: TypeAlias = int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRecord:
    """The policy that made a sample.

    Attributes:
        name: The name of the policy.
        weight_version: The version of the weights from which it was last copied or averaged.
        decay: The decay of its last average; None: it was copied.
        num_updates: How often it was copied or averaged since it was made.
    """

    name: str
    weight_version: str
    decay: Number | None
    num_updates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy in memory.

    Attributes:
        name: The name by which a request chooses it.
        kind: "weights": the whole transformer, kept in the host's memory and exchanged with the weights in place when its turn
            comes. "adapter": a LoRA adapter beside the weights.
        weight_version: The version of the weights from which it was last copied or averaged.
        decay: The decay of its last average; None: it was copied.
        num_updates: How often it was copied or averaged since it was made.
        num_bytes: The bytes that it takes on rank 0.
    """

    name: str
    kind: PolicyKind
    weight_version: str
    decay: Number | None
    num_updates: int
    num_bytes: int

    @property
    def record(self) -> PolicyRecord:
        """The policy's entry in a sample's record."""
        return PolicyRecord(name=self.name, weight_version=self.weight_version, decay=self.decay, num_updates=self.num_updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChange:
    """A finished change of a policy.

    Attributes:
        name: The name of the policy.
        policy: The policy as it is now; None: it is gone.
        paused_s: The seconds for which no request could run.
    """

    name: str
    policy: Policy | None
    paused_s: float
