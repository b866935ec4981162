"""What the viewer looks at, and what it asks of an engine where there is one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from flowroll.store import Selection
from flowroll.types import Rollout, ScoreAnswer, ScoreParams


@runtime_checkable
class Source(Protocol):
    """Where rollouts are: `RolloutStore` and `RolloutFiles` are such."""

    def select(
        self,
        *,
        prompt_contains: str | None = None,
        weight_version: str | None = None,
        min_reward: float | None = None,
        request_id: str | None = None,
    ) -> Selection:
        """Selects the samples that match all that is given."""
        ...

    def load(self, sample: str) -> Rollout:
        """Reads one rollout."""
        ...

    def picture(self, sample: str) -> Tensor | bytes | None:
        """Reads the picture alone of one rollout."""
        ...


@runtime_checkable
class Model(Protocol):
    """What an engine can add to what is stored: `Engine` is such."""

    def decode(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        """Decodes the latents of one sample into a picture."""
        ...

    def run_scores(self, params: ScoreParams) -> ScoreAnswer:
        """Recomputes the log-probs of recorded steps under the weights in memory."""
        ...
