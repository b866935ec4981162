"""What the examples' learners share: an optimizer, and a round's samples dealt out to its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from examples.rl.loop import Batch

_MAX_GRADIENT = 1.0


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
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(policy.parameters(), lr=self._learning_rate, weight_decay=0.0)
        order = torch.randperm(len(batch.rollouts), generator=batch.generator).tolist()
        size = len(order) // self._updates
        for number in range(self._updates):
            yield order[number * size : (number + 1) * size]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), _MAX_GRADIENT)
            self._optimizer.step()
            self._optimizer.zero_grad()
