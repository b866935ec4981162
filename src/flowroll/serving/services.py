"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from flowroll.engine.plan import RequestPlan
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.weights import WeightFiles
from flowroll.engine.worker import EngineWorker
from flowroll.serving.config import ServerConfig
from flowroll.serving.metrics import Metrics
from flowroll.serving.probe import GenerationProbe
from flowroll.types import GeneratedImage, Rollout, ScoreAnswer, WeightUpdate

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes of one app share.

    Attributes:
        config: How the server was started.
        worker: Runs the engine.
        metrics: Counts.
        probe: Tells whether the engine can generate.
        started_s: Monotonic clock at the start.
        updating: Held by the one update of weights that is under way: each needs memory for a second set.
    """

    config: ServerConfig
    worker: EngineWorker
    metrics: Metrics
    probe: GenerationProbe
    started_s: float = field(default_factory=time.monotonic)
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)

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

    async def update_weights(self, files: WeightFiles, weight_version: str | None) -> WeightUpdate:
        """Reads new weights while requests run, and exchanges them between two requests."""
        engine = self.worker.engine
        async with self.updating:
            try:
                staged = await run_in_threadpool(engine.stage_weights, files)
                commit = functools.partial(engine.commit_weights, staged, weight_version=weight_version)
                update = await self.between_requests(commit)
            except BaseException:
                self.metrics.weight_updates.labels("failed").inc()
                raise
        self.metrics.weight_updates.labels("completed").inc()
        self.metrics.weight_pause_seconds.inc(update.paused_s)
        return update

    async def between_requests(self, action: Callable[[], T]) -> T:
        """Has something done on the engine's thread while no request runs."""
        return await asyncio.wrap_future(self.worker.between_requests(action))

    async def score(self, plan: ScorePlan) -> ScoreAnswer:
        """Scores recorded steps on the engine's thread."""
        answer = await asyncio.wrap_future(self.worker.submit(plan, "score"))
        self.metrics.scored_steps.inc(sum(len(sample.steps) for sample in answer.samples))
        return answer
