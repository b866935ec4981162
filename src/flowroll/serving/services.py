"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from flowroll.engine.plan import RequestPlan
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.worker import EngineWorker
from flowroll.serving.config import ServerConfig
from flowroll.serving.metrics import Metrics
from flowroll.serving.probe import GenerationProbe
from flowroll.types import GeneratedImage, Rollout, ScoreAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes of one app share.

    Attributes:
        config: How the server was started.
        worker: Runs the engine.
        metrics: Counts.
        probe: Tells whether the engine can generate.
        started_s: Monotonic clock at the start.
    """

    config: ServerConfig
    worker: EngineWorker
    metrics: Metrics
    probe: GenerationProbe
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def build(cls, worker: EngineWorker, config: ServerConfig) -> Services:
        """The services of a new app."""
        return cls(config=config, worker=worker, metrics=Metrics(worker), probe=GenerationProbe(worker))

    async def rollout(self, plan: RequestPlan) -> list[Rollout]:
        """Runs a planned rollout on the engine's thread."""
        rollouts = await asyncio.wrap_future(self.worker.submit(plan, "rollout"))
        self.metrics.observe_result(plan, "rollout")
        return rollouts

    async def generate(self, plan: RequestPlan) -> list[GeneratedImage]:
        """Runs a planned generation on the engine's thread."""
        images = await asyncio.wrap_future(self.worker.submit(plan, "generate"))
        self.metrics.observe_result(plan, "generate")
        return images

    async def score(self, plan: ScorePlan) -> ScoreAnswer:
        """Scores recorded steps on the engine's thread."""
        answer = await asyncio.wrap_future(self.worker.submit(plan, "score"))
        self.metrics.scored_steps.inc(sum(len(sample.steps) for sample in answer.samples))
        return answer
