"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from flowroll.engine import RequestFuture
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER, factor_names, read_factors
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import StagedWeights
from flowroll.engine.worker import EngineWorker, RequestKind
from flowroll.errors import InvalidRequestError
from flowroll.serving.config import ServerConfig
from flowroll.serving.disconnect import while_connected
from flowroll.serving.metrics import Metrics
from flowroll.serving.middleware import context_of
from flowroll.serving.negotiation import choose_deadline_s
from flowroll.serving.probe import GenerationProbe
from flowroll.serving.pushes import WeightPush, WeightPushes
from flowroll.serving.weight_groups import WeightGroups
from flowroll.serving.weight_updates import OpenUpdate, WeightUpdates
from flowroll.types import AdapterChange, GeneratedImage, ModuleName, Rollout, ScoreAnswer, WeightUpdate
from flowroll.wire.arrivals import Bucketed, SharedUpdateObject, UpdateFromTensorRequest

T = TypeVar("T")
C = TypeVar("C", WeightUpdate, AdapterChange)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppState:
    """What the routes of one app share.

    Attributes:
        config: How the server was started.
        worker: Runs the engine.
        metrics: Counts.
        probe: Tells whether the engine can generate.
        started_s: Monotonic clock at the start.
        updating: Held by the one change of weights or adapters that reads or commits: each needs memory of its own.
        arriving: The update whose tensors arrive over HTTP.
        pushes: Those of which a bucket is in place and others are missing.
        groups: Process groups with trainers.
    """

    config: ServerConfig
    worker: EngineWorker
    metrics: Metrics
    probe: GenerationProbe
    started_s: float = field(default_factory=time.monotonic)
    updating: asyncio.Lock = field(default_factory=asyncio.Lock)
    arriving: WeightUpdates
    pushes: WeightPushes
    groups: WeightGroups = field(default_factory=WeightGroups)

    @classmethod
    def build(cls, worker: EngineWorker, config: ServerConfig) -> AppState:
        """The state of a new app."""
        arriving = WeightUpdates(worker.engine, idle_s=config.weights_idle_s)
        metrics = Metrics(worker)
        pushes = WeightPushes(
            worker.engine.scheduler.hold_starts,
            lambda outcome: metrics.weight_pushes.labels(outcome).inc(),
            idle_s=config.weights_idle_s,
        )
        return cls(
            config=config,
            worker=worker,
            metrics=metrics,
            probe=GenerationProbe(worker),
            arriving=arriving,
            pushes=pushes,
        )

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
        with context_of(request).stage("serialise"):
            return await run_in_threadpool(encode, *values, **options)

    async def _run(self, request: Request, plan: RequestPlan, accepted: RequestFuture[T], kind: RequestKind) -> list[T]:
        try:
            results = await while_connected(request, accepted, self.worker.cancel)
        finally:
            context_of(request).stretches += accepted.spans
        self.metrics.observe_result(plan, kind)
        return results

    async def update_weights(
        self,
        stage: Callable[[], StagedWeights],
        weight_version: str | None,
        mode: ExclusiveMode = "drain",
        *,
        is_whole: bool = True,
    ) -> WeightUpdate:
        """Gets new weights ready while requests run, and exchanges them between two requests.

        Args:
            stage: Gets them ready; called on a thread.
            weight_version: Of the new weights; None: counted.
            mode: What becomes of the requests that run.
            is_whole: Whether they are all of the module's, which ends a push of it.
        """
        commit = functools.partial(self.worker.engine.commit_weights, weight_version=weight_version, mode=mode)
        update = await self.change_policy(stage, commit, mode)
        if is_whole:
            self.pushes.replaced(update.module)
        return update

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

    async def commit_arrival(self, arrival: OpenUpdate, mode: ExclusiveMode = "drain") -> WeightUpdate:
        """Ends an update whose tensors have arrived; one that lacks some goes on."""
        arrival.is_committing = True
        try:
            incoming, version = arrival.incoming, arrival.weight_version
            return await self.update_weights(incoming.stage, version, mode, is_whole=not incoming.partial)
        finally:
            arrival.is_committing = False
            arrival.touch()
            if not arrival.incoming.is_open:
                self.arriving.end(arrival)

    async def take_bucket(
        self, accepted: Bucketed, names: Collection[str], fill: Callable[[WeightReceiver], None]
    ) -> SharedUpdateObject:
        """Puts a bucket in place, on all ranks or on none, or adds it to the update that it names.

        Args:
            accepted: What the sender says of it.
            names: Of its tensors.
            fill: Adds them; called on a thread.
        """
        if accepted.update_id is not None:
            return await self._add_bucket(accepted, accepted.update_id, fill)
        engine, module = self.worker.engine, accepted.chosen_module

        def stage() -> StagedWeights:
            try:
                fill(incoming)
                return incoming.stage()
            finally:
                incoming.drop()

        async with self.pushes.turn:
            self.arriving.check_none()
            incoming = engine.receive_weights(module, partial=True)
            staged = await run_in_threadpool(stage)
            with self.pushes.bucket(module, accepted.weight_version, set(names), incoming.names) as push:
                version = push.version or accepted.weight_version
                update = await self.update_weights(lambda: staged, version, accepted.mode, is_whole=False)
                push.version = update.weight_version
        return _bucket_answer(push, module, f"{len(names)} tensors of {module} are in place", update.weight_version)

    async def take_lora_bucket(
        self, accepted: UpdateFromTensorRequest, names: Collection[str], copy: Callable[[], Mapping[str, Tensor]]
    ) -> SharedUpdateObject:
        """Puts factors of the pushed adapter in place, on all ranks or on none; requests that name no adapter run with it.

        Args:
            accepted: What the sender says of them.
            names: Of the tensors.
            copy: Gives them, on the CPU; called on a thread.
        """
        engine, merged = self.worker.engine, self.config.lora_merge_mode == "merge"
        layers = {layer for layer, _ in factor_names(list(names)).values()}
        async with self.pushes.turn:
            self.arriving.check_none()
            factors = read_factors(await run_in_threadpool(copy), accepted.lora_alpha, accepted.lora_rank)
            with (
                tempfile.TemporaryDirectory(prefix="flowroll-") as folder,
                self.pushes.bucket(PUSHED_ADAPTER, accepted.weight_version, layers) as push,
            ):
                stage = functools.partial(engine.stage_pushed_lora, factors, Path(folder), merged=merged)
                version = push.version or accepted.weight_version
                commit = functools.partial(engine.commit_lora_adapter, weight_version=version, mode=accepted.mode)
                change = await self.change_policy(stage, commit, accepted.mode)
                push.version = change.weight_version
        return _bucket_answer(push, "transformer", f"{len(layers)} layers of the adapter are in place", change.weight_version)

    async def _add_bucket(
        self, accepted: Bucketed, update_id: str, fill: Callable[[WeightReceiver], None]
    ) -> SharedUpdateObject:
        """Adds a bucket to an update that was begun by name; nothing is put in place."""
        arrival = self.arriving.get(update_id)
        incoming, module = arrival.incoming, accepted.chosen_module
        if module != incoming.module:
            raise InvalidRequestError(
                f"target_modules must be of the update, got {module} for one of {incoming.module}; send its module, or "
                "begin another update.",
                field="target_modules",
            )
        arrival.fills += 1
        try:
            await run_in_threadpool(fill, incoming)
        finally:
            arrival.fills -= 1
            arrival.touch()
        count, total = incoming.num_arrived, incoming.num_tensors
        return SharedUpdateObject(
            message=f"{count} of {total} tensors have arrived; they are put in place at the commit of {update_id}",
            module=module,
            is_complete=False,
            weight_version=self.worker.engine.weight_version,
            num_arrived=count,
            num_tensors=total,
        )

    async def between_requests(self, action: Callable[[], T], mode: ExclusiveMode = "drain") -> T:
        """Has something done on the engine's thread while no request runs."""
        return await asyncio.wrap_future(self.worker.between_requests(action, mode=mode))

    async def score(self, request: Request, plan: ScorePlan) -> ScoreAnswer:
        """Scores recorded steps, between the steps of requests, for as long as their client is there."""
        self.pushes.check_whole()
        scores = self.worker.submit_scores(plan, timeout_s=_timeout_s(request))
        with context_of(request).stage("score"):
            answer = await while_connected(request, scores, self.worker.cancel)
        self.metrics.scored_steps.inc(sum(len(sample.steps) for sample in answer.samples))
        return answer


def _timeout_s(request: Request) -> float | None:
    return choose_deadline_s(request.headers)


def _bucket_answer(push: WeightPush, module: ModuleName, message: str, version: str) -> SharedUpdateObject:
    if missing := len(push.expected) - len(push.arrived):
        message += f"; {missing} of {len(push.expected)} are missing, and no sample starts until they have come"
    return SharedUpdateObject(
        message=message,
        module=module,
        is_complete=push.is_complete,
        weight_version=version,
        num_arrived=len(push.arrived),
        num_tensors=len(push.expected),
    )
