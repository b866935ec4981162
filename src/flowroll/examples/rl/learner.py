"""What the examples' learners share: the interface to the loop, an optimizer, and a round's samples dealt out to its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flowroll import Rollout
from flowroll.examples.rl.publishing import OldPolicy

_MAX_GRADIENT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rollouts of one round.

    Attributes:
        rollouts: Groups side by side.
        rewards: Of each.
        groups: The number of each one's group.
        advantages: Of each, within its group.
        generator: For what the update draws.
    """

    rollouts: Sequence[Rollout]
    rewards: Float[Tensor, " samples"]
    groups: Int[Tensor, " samples"]
    advantages: Float[Tensor, " samples"]
    generator: torch.Generator


@runtime_checkable
class Learner(Protocol):
    """An algorithm."""

    @property
    def old(self) -> OldPolicy | None:
        """The policy that rolls out, where that is not the one that was published last."""

    def request(self, number: int) -> Mapping[str, Any]:
        """Fields of the rollout requests of a round beyond prompts, seeds and steps."""

    def update(self, policy: nn.Module, batch: Batch) -> float | None:
        """Changes the policy; returns the largest |ratio - 1| before the first change, None where there is no ratio."""

    def state(self) -> dict[str, Any]:
        """What must be saved beside the policy, in plain values and tensors."""

    def restore(self, state: Mapping[str, Any], policy: nn.Module) -> None:
        """Goes on from what was saved."""


class Descent:
    """Some optimizer steps a round.

    Args:
        learning_rate: Of AdamW.
        updates: Steps of a round, each on an equal share of its samples.
    """

    def __init__(self, *, learning_rate: float, updates: int) -> None:
        self._learning_rate, self._updates = learning_rate, updates
        self._optimizer: torch.optim.Optimizer | None = None

    def steps(self, policy: nn.Module, batch: Batch) -> Iterator[Sequence[int]]:
        """Gives the samples of each step, in random order; takes the step with the gradient that the loop's body leaves."""
        optimizer = self._optimizer_of(policy)
        order = torch.randperm(len(batch.rollouts), generator=batch.generator).tolist()
        size = len(order) // self._updates
        for number in range(self._updates):
            yield order[number * size : (number + 1) * size]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), _MAX_GRADIENT)
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """The optimizer's state."""
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def restore(self, state: Mapping[str, Any], policy: nn.Module) -> None:
        """Goes on with a saved state."""
        if state:
            self._optimizer_of(policy).load_state_dict(dict(state))

    def _optimizer_of(self, policy: nn.Module) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(policy.parameters(), lr=self._learning_rate, weight_decay=0.0)
        return self._optimizer
