"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine import RequestPlan
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER, factor_names
from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.scheduler.request import cancelled
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.service import (
    CallFuture,
    EngineClient,
    EngineService,
    EngineStatus,
    Evidence,
    RequestKind,
    UpdateProgress,
)
from flowroll.errors import EngineError, ForbiddenError, InvalidRequestError, QueueFullError
from flowroll.serving.config import ServerConfig
from flowroll.serving.disconnect import while_connected
from flowroll.serving.metrics import Metrics
from flowroll.serving.middleware import context_of
from flowroll.serving.negotiation import choose_deadline_s
from flowroll.serving.pushes import WeightPush, WeightPushes
from flowroll.serving.unsent import AnswerMemory
from flowroll.serving.weight_uploads import WeightUpload, WeightUploads
from flowroll.types import AdapterChange, ModuleName, PolicyChange, ScoreAnswer, WeightUpdate
from flowroll.wire.weight_updates import Bucketed, SharedUpdateObject, UpdateFromTensorRequest

T = TypeVar("T")
C = TypeVar("C", WeightUpdate, AdapterChange, PolicyChange)
# Requests that are parsed and planned at the same time, each on a thread. More would not be done sooner, because Python runs
# one thread at a time, but the event loop would have its turn less often.
_NUM_PLANNED = 4
# How long an engine may take to say how it is. It answers between two instructions of Python, also while a step runs.
_STATUS_S = 10.0
_RETRY_S = 1.0
# What goes on one at a time, as errors name it.
CHANGES, ADAPTER_BODIES = "changes of weights, adapters and memory", "adapters in bodies"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppState:
    """What the routes of one app share.

    Attributes:
        config: The options that the server was started with.
        engine: The engine that runs the requests.
        metrics: The counters that /metrics shows.
        started_s: When the app was started, by the monotonic clock.
        turns: Held by the one change of weights, adapters or memory that reads or commits: each needs memory of its own; and by
            the one adapter that is read from a body.
        waiting: How many requests hold or wait for one of these locks, by what they want.
        probing: The one look at whether the engine generates, which all callers share.
        uploads: The update of weights whose tensors arrive over HTTP, if there is one.
        pushes: The pushes of weights of which a bucket is in place and others are missing.
        answers: The memory of the answers that are not sent to their end.
        planning: Held by the requests that are parsed and planned.
    """

    config: ServerConfig
    engine: EngineClient
    metrics: Metrics
    started_s: float = field(default_factory=time.monotonic)
    turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    waiting: Counter[str] = field(default_factory=Counter)
    probing: list[CallFuture[Evidence]] = field(default_factory=list)
    uploads: WeightUploads
    pushes: WeightPushes
    answers: AnswerMemory
    planning: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_PLANNED))

    @classmethod
    def build(cls, engine: EngineClient, config: ServerConfig) -> AppState:
        """Returns the state of a new app."""
        answers = AnswerMemory(config.max_unsent_bytes)
        metrics = Metrics(engine.facts.pid, answers, engine.facts.info.fast)
        pushes = WeightPushes(
            lambda is_held: engine.call(EngineService.hold_starts, is_held),
            lambda outcome: metrics.weight_pushes.labels(outcome).inc(),
            idle_s=config.weights_idle_s,
        )
        uploads = WeightUploads(engine, idle_s=config.weights_idle_s)
        return cls(config=config, engine=engine, metrics=metrics, uploads=uploads, pushes=pushes, answers=answers)

    # Requests

    async def run(self, request: Request, plan: RequestPlan, kind: RequestKind) -> list[Any]:
        """Runs a planned rollout or generation, for as long as its client is there; returns what `kind` says."""
        timeout_s = choose_deadline_s(request.headers)
        await self.check_wanted(request)
        # The tensors and images that came with it lie in both processes until it is answered.
        context_of(request).held = self.answers.admit(2 * plan.input_bytes + plan.answer_bytes)
        accepted = self.engine.call(EngineService.submit, plan, kind, timeout_s=timeout_s)
        try:
            results: list[Any] = await while_connected(request, accepted, self.engine.cancel)
        finally:
            context_of(request).spans += accepted.spans
        self.metrics.observe_result(plan, kind, results)
        return results

    async def score(self, request: Request, plan: ScorePlan) -> ScoreAnswer:
        """Recomputes log-probs of recorded steps, between the steps of requests, for as long as their client is there."""
        self.pushes.check_whole()
        timeout_s = choose_deadline_s(request.headers)
        await self.check_wanted(request)
        context = context_of(request)
        context.held = self.answers.admit(context.request_bytes + plan.answer_bytes)
        scores = self.engine.call(EngineService.submit_scores, plan, timeout_s=timeout_s)
        with context_of(request).stage("score"):
            answer = await while_connected(request, scores, self.engine.cancel)
        self.metrics.scored_steps.inc(sum(len(sample.steps) for sample in answer.samples))
        return answer

    async def check_wanted(self, request: Request) -> None:
        """Drops a request whose client has gone while its body was read, or while it waited to be planned.

        Raises:
            CancelledRequestError: It has.
        """
        # It is seen in a turn of the event loop after that which has brought the end of the body.
        await asyncio.sleep(0)
        if await request.is_disconnected():
            self.metrics.dropped_requests.inc()
            raise cancelled()

    async def serialise(self, request: Request, encode: Callable[..., T], /, *values: Any, **options: Any) -> T:
        """Encodes an answer on a thread, and notes how long that took.

        A streamed body's base64 is made later, piece by piece, while it is sent.
        """
        with context_of(request).stage("serialise"):
            return await run_in_threadpool(encode, *values, **options)

    # The engine's state

    async def status(self) -> EngineStatus:
        """Returns the engine at this moment.

        Raises:
            EngineError: It does not answer.
        """
        try:
            return await asyncio.wait_for(self.engine.call(EngineService.status), _STATUS_S)
        except TimeoutError:
            raise EngineError(f"the engine must answer within {_STATUS_S:g} s, got no answer; restart the server.") from None

    async def probe(self) -> Evidence:
        """Returns what shows that the engine generates; callers at the same time share one look at it.

        Raises:
            FlowrollError: Why it does not.
        """
        if not self.probing or self.probing[0].done():
            self.probing[:] = [self.engine.call(EngineService.probe_generation)]
        # Shielded: a caller that gives up must not take the others' answer with it.
        return await asyncio.shield(self.probing[0])

    # Changes of weights and adapters

    @contextlib.asynccontextmanager
    async def turn(self, what: str) -> AsyncIterator[None]:
        """Lets one of `CHANGES` or one of `ADAPTER_BODIES` go on at a time; the number of those that wait is bounded.

        Raises:
            QueueFullError: Too many of them wait.
        """
        most = self.config.max_control_queue
        if self.waiting[what] >= most:
            raise QueueFullError(
                f"{what} must be at most {most} at a time, got one more; try again in {_RETRY_S:.0f} s.", retry_after_s=_RETRY_S
            )
        self.waiting[what] += 1
        try:
            async with self.turns[what]:
                yield
        finally:
            self.waiting[what] -= 1

    async def change_policy(self, change: Callable[[], Awaitable[C]]) -> C:
        """Changes weights or adapters, one change at a time, and counts it."""
        async with self.turn(CHANGES):
            try:
                changed = await change()
            except BaseException:
                self.metrics.weight_updates.labels("failed").inc()
                raise
        self.metrics.weight_updates.labels("completed").inc()
        self.metrics.weight_pause_seconds.inc(changed.paused_s)
        return changed

    async def update_weights(self, call: Callable[[], CallFuture[WeightUpdate]], *, is_whole: bool = True) -> WeightUpdate:
        """Has the engine get new weights ready while requests run, and exchange them between two requests.

        Args:
            call: Has the engine do it.
            is_whole: Whether they are all of the module's, which ends a push of it.
        """
        update = await self.change_policy(call)
        if is_whole:
            self.pushes.replaced(update.module)
        return update

    async def commit_upload(self, upload: WeightUpload, mode: ExclusiveMode = "drain") -> WeightUpdate:
        """Ends an update whose tensors have arrived; one that lacks some goes on."""
        upload.is_committing = True
        number, version = upload.update_id, upload.weight_version
        try:
            return await self.update_weights(
                lambda: self.engine.call(EngineService.commit_update, number, version, mode), is_whole=not upload.partial
            )
        finally:
            upload.is_committing = False
            upload.touch()
            if not await asyncio.shield(self.engine.call(EngineService.is_open, number)):
                self.uploads.end(upload)

    async def take_bucket(
        self, accepted: Bucketed, names: Collection[str], fill: Callable[[str], CallFuture[UpdateProgress]]
    ) -> SharedUpdateObject:
        """Puts a bucket in place, on all ranks or on none, or adds it to the update that it names.

        Args:
            accepted: What the sender says of it.
            names: The names of its tensors.
            fill: Has the engine add them to the update of this id.
        """
        if accepted.update_id is not None:
            return await self._add_bucket(accepted, accepted.update_id, fill)
        if not self.engine.takes_lone_buckets:
            raise ForbiddenError(
                "a bucket for a fleet must be a part of weights that are put in place together, got it alone; call "
                "/weights/begin (of vLLM's verbs /start_weight_update), and give its update_id."
            )
        module = accepted.chosen_module
        async with self.pushes.turn:
            self.uploads.check_none()
            opened = await self.engine.call(EngineService.open_update, module, partial=True)
            try:
                await fill(opened.update_id)
                with self.pushes.bucket(module, accepted.weight_version, set(names), opened.names) as push:
                    version = push.version or accepted.weight_version
                    update = await self.update_weights(
                        lambda: self.engine.call(EngineService.commit_update, opened.update_id, version, accepted.mode),
                        is_whole=False,
                    )
                    push.version = update.weight_version
            finally:
                self.engine.call(EngineService.drop_update, opened.update_id)
        return _bucket_answer(push, opened.module, f"{len(names)} tensors of {module} are in place", update.weight_version)

    async def take_lora_bucket(
        self, accepted: UpdateFromTensorRequest, names: Collection[str], sent_id: str
    ) -> SharedUpdateObject:
        """Puts factors of the pushed adapter in place, on all ranks or on none; requests that name no adapter run with it.

        Args:
            accepted: What the sender says of them.
            names: The names of the tensors.
            sent_id: Names the tensors at the engine.
        """
        layers = {layer for layer, _ in factor_names(list(names)).values()}
        async with self.pushes.turn:
            self.uploads.check_none()
            with self.pushes.bucket(PUSHED_ADAPTER, accepted.weight_version, layers) as push:
                change = await self.change_policy(
                    lambda: self.engine.call(
                        EngineService.load_pushed_adapter,
                        sent_id,
                        alpha=accepted.lora_alpha,
                        rank=accepted.lora_rank,
                        merged=self.config.lora_merge_mode == "merge",
                        weight_version=push.version or accepted.weight_version,
                        mode=accepted.mode,
                    )
                )
                push.version = change.weight_version
        return _bucket_answer(push, "transformer", f"{len(layers)} layers of the adapter are in place", change.weight_version)

    async def _add_bucket(
        self, accepted: Bucketed, update_id: str, fill: Callable[[str], CallFuture[UpdateProgress]]
    ) -> SharedUpdateObject:
        """Adds a bucket to an update that was begun by name; nothing is put in place."""
        upload, module = self.uploads.get(update_id), accepted.chosen_module
        if module != upload.opened.module:
            raise InvalidRequestError(
                f"target_modules must be of the update, got {module} for one of {upload.opened.module}; send its module, or "
                "begin another update.",
                field="target_modules",
            )
        upload.fills += 1
        try:
            progress = await fill(update_id)
        finally:
            upload.fills -= 1
            upload.touch()
        count, total = progress.num_arrived, progress.num_tensors
        return SharedUpdateObject(
            message=f"{count} of {total} tensors have arrived; they are put in place at the commit of {update_id}",
            module=upload.opened.module,
            is_complete=False,
            weight_version=progress.weight_version,
            num_arrived=count,
            num_tensors=total,
        )


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
