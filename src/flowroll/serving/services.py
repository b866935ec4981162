"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine import RequestFuture
from flowroll.engine.incoming import IncomingWeights
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.weights import StagedWeights
from flowroll.engine.worker import EngineWorker, RequestKind
from flowroll.serving.arrivals import Arrival, WeightArrivals
from flowroll.serving.config import ServerConfig
from flowroll.serving.disconnect import while_connected
from flowroll.serving.metrics import Metrics
from flowroll.serving.middleware import exchange_of
from flowroll.serving.negotiation import choose_deadline_s
from flowroll.serving.probe import GenerationProbe
from flowroll.serving.weight_groups import WeightGroups
from flowroll.types import AdapterChange, GeneratedImage, Rollout, ScoreAnswer, WeightUpdate
from flowroll.wire.arrivals import SharedUpdateObject
from flowroll.wire.weights import Targeted

T = TypeVar("T")
C = TypeVar("C", WeightUpdate, AdapterChange)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes of one app share.

    Attributes:
        config: How the server was started.
        worker: Runs the engine.
        metrics: Counts.
        probe: Tells whether the engine can generate.
        started_s: Monotonic clock at the start.
        updating: Held by the one change of weights or adapters that reads or commits: each needs memory of its own.
        arriving: The update whose tensors arrive over HTTP.
        groups: Process groups with trainers.
    """

    config: ServerConfig
    worker: EngineWorker
    metrics: Metrics
    probe: GenerationProbe
    started_s: float = field(default_factory=time.monotonic)
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)
    arriving: WeightArrivals
    groups: WeightGroups = field(default_factory=WeightGroups)

    @classmethod
    def build(cls, worker: EngineWorker, config: ServerConfig) -> Services:
        """The services of a new app."""
        arriving = WeightArrivals(worker.engine, idle_s=config.weights_idle_s)
        return cls(config=config, worker=worker, metrics=Metrics(worker), probe=GenerationProbe(worker), arriving=arriving)

    async def rollout(self, request: Request, plan: RequestPlan) -> list[Rollout]:
        """Runs a planned rollout, for as long as its client is there."""
        return await self._run(request, plan, self.worker.submit(plan, "rollout", timeout_s=_timeout_s(request)), "rollout")

    async def generate(self, request: Request, plan: RequestPlan) -> list[GeneratedImage]:
        """Runs a planned generation, for as long as its client is there."""
        return await self._run(request, plan, self.worker.submit(plan, "generate", timeout_s=_timeout_s(request)), "generate")

    async def serialise(self, request: Request, encode: Callable[..., T], /, *values: Any, **options: Any) -> T:
        """Encodes an answer on a thread, and notes how long that took.

        A streamed body's base64 is made later, piece by piece, while it is sent.
        """
        with exchange_of(request).stage("serialise"):
            return await run_in_threadpool(encode, *values, **options)

    async def _run(self, request: Request, plan: RequestPlan, accepted: RequestFuture[T], kind: RequestKind) -> list[T]:
        try:
            results = await while_connected(request, accepted, self.worker.cancel)
        finally:
            exchange_of(request).stretches += accepted.spans
        self.metrics.observe_result(plan, kind)
        return results

    async def update_weights(
        self, stage: Callable[[], StagedWeights], weight_version: str | None, mode: ExclusiveMode = "drain"
    ) -> WeightUpdate:
        """Gets new weights ready while requests run, and exchanges them between two requests."""
        commit = functools.partial(self.worker.engine.commit_weights, weight_version=weight_version, mode=mode)
        return await self.change_policy(stage, commit, mode)

    async def change_policy(self, stage: Callable[[], T], commit: Callable[[T], C], mode: ExclusiveMode) -> C:
        """Changes weights or adapters, one change at a time, and counts it.

        Args:
            stage: Gets the change ready; called on a thread, while requests run.
            commit: Makes it, of what `stage` returned; called between two requests.
            mode: What becomes of the requests that run.
        """
        async with self.updating:
            try:
                staged = await run_in_threadpool(stage)
                change = await self.between_requests(lambda: commit(staged), mode)
            except BaseException:
                self.metrics.weight_updates.labels("failed").inc()
                raise
        self.metrics.weight_updates.labels("completed").inc()
        self.metrics.weight_pause_seconds.inc(change.paused_s)
        return change

    async def commit_arrival(self, arrival: Arrival, mode: ExclusiveMode = "drain") -> WeightUpdate:
        """Ends an update whose tensors have arrived; one that lacks some goes on."""
        arrival.is_committing = True
        try:
            return await self.update_weights(arrival.incoming.stage, arrival.weight_version, mode)
        finally:
            arrival.is_committing = False
            arrival.touch()
            if not arrival.incoming.is_open:
                self.arriving.end(arrival)

    async def take_bucket(
        self, accepted: Targeted, names: Collection[str], fill: Callable[[IncomingWeights], None]
    ) -> SharedUpdateObject:
        """Adds a bucket to the update that it belongs to, and commits that once it is whole. An error ends the update.

        Args:
            accepted: What the sender says of the update.
            names: Of the bucket's tensors.
            fill: Adds them; called on a thread.
        """
        arrival = self.arriving.join(accepted.chosen_module, accepted.weight_version, names)
        incoming = arrival.incoming
        try:
            arrival.fills += 1
            try:
                await run_in_threadpool(fill, incoming)
            finally:
                arrival.fills -= 1
                arrival.touch()
            count, total = incoming.num_arrived, incoming.num_tensors
            is_complete = incoming.is_complete and not arrival.is_committing
            if is_complete:
                await self.commit_arrival(arrival, accepted.mode)
        except BaseException:
            self.arriving.end(arrival)
            raise
        return SharedUpdateObject(
            message=f"{count} of {total} tensors have arrived" + ("; the weights are exchanged" if is_complete else ""),
            module=incoming.module,
            is_complete=is_complete,
            weight_version=self.worker.engine.weight_version,
            num_arrived=count,
            num_tensors=total,
        )

    async def between_requests(self, action: Callable[[], T], mode: ExclusiveMode = "drain") -> T:
        """Has something done on the engine's thread while no request runs."""
        return await asyncio.wrap_future(self.worker.between_requests(action, mode=mode))

    async def score(self, request: Request, plan: ScorePlan) -> ScoreAnswer:
        """Scores recorded steps, between the steps of requests, for as long as their client is there."""
        scores = self.worker.submit_scores(plan, timeout_s=_timeout_s(request))
        with exchange_of(request).stage("score"):
            answer = await while_connected(request, scores, self.worker.cancel)
        self.metrics.scored_steps.inc(sum(len(sample.steps) for sample in answer.samples))
        return answer


def _timeout_s(request: Request) -> float | None:
    return choose_deadline_s(request.headers)
