"""A fleet: several replicas as the one engine of a server.

`Fleet` has the interface of an engine, so that the HTTP side is that of a single server, with its routes, dialects, bounds and
errors. Requests are routed; what changes weights, adapters, policies or memory is done on all replicas or on none; a
replica that ends is replaced by one that gets the fleet's weights before it takes a request. One event loop, on a thread of its
own, owns everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import ray
from typing_extensions import override

from flowroll.cluster.changes import AdapterLoad, AdapterUnload, Bucket, Change, FromDisk, PolicyOperation, Upload
from flowroll.cluster.parcel import pack
from flowroll.cluster.replica import ActorReplica, Placement, local_spans
from flowroll.cluster.routing import Part, Router, VersionSequence, soonest
from flowroll.cluster.updates import Change as Changed
from flowroll.cluster.updates import ChangeKind, ChangeLog, ReplicaLostError, change_all
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import LoadStats, RequestCounts, StageSpan
from flowroll.engine.scheduler.request import cancelled, engine_error, too_late
from flowroll.engine.service import CallFuture, EngineClient, EngineFacts, EngineStatus, OpenedUpdate, UpdateProgress
from flowroll.engine.service.client import FailureListener
from flowroll.errors import (
    EngineError,
    FlowrollError,
    ForbiddenError,
    NotFoundError,
    OutdatedWeightsError,
    QueueFullError,
    RankLostError,
    ShuttingDownError,
)

_log = logging.getLogger(__name__)
UpdateOrder: TypeAlias = Literal["rolling", "barrier"]
# A replica is asked for its state so often; one that is silent for the patience is replaced.
_PULSE_S = 1.0
# How long a request whose replica has ended waits for another one, if none is left.
_NO_REPLICA_S = 300.0
# A request that has ended so many replicas is not given to another one.
_MAX_LOSSES = 3
# Between two attempts to replace a replica.
_FIRST_REST_S, _MAX_REST_S = 0.5, 30.0
# What any one replica can answer.
_OF_ONE = frozenset({"decode", "probe_generation", "check_adapter", "lora_adapters", "policies"})
_UNSHARED = (
    "the weights of a fleet must come over HTTP, from disk or as an adapter, got {}; use /weights/begin or "
    "/update_weights_from_disk, of which each replica gets its own copy."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """A replica, as /replicas shows it.

    Attributes:
        id: Its id; a replica that replaces another one has a new id.
        state: "starting", "ready" or "draining".
        weight_version: The version of its weights; None while it starts.
        version_number: The number of this version in the fleet's sequence; None while it starts.
        image_steps: The denoising steps that it has yet to take.
        num_requests: The requests, or parts of requests, that it has not answered.
        node: The id of its node in Ray.
        pid: The process id of its rank 0.
        uptime_s: Seconds since it was started.
    """

    id: str
    state: str
    weight_version: str | None
    version_number: int | None
    image_steps: int
    num_requests: int
    node: str
    pid: int | None
    uptime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetInfo:
    """The replicas of a fleet, and what has happened to them.

    Attributes:
        weight_version: The newest version of the weights.
        version_number: Its number in the fleet's sequence.
        replicas: The replicas that are there.
        num_lost: The number of replicas that have ended and were, or will be, replaced.
        num_retried: The number of requests, or parts of requests, that were run again because their replica ended.
        num_split: The number of requests that were run by several replicas.
        samples_by_version: The number of samples by the version of the weights that made them, for the newest versions.
    """

    weight_version: str
    version_number: int
    replicas: tuple[ReplicaInfo, ...]
    num_lost: int
    num_retried: int
    num_split: int
    samples_by_version: Mapping[str, int]


@dataclass(slots=True, kw_only=True)
class _Tally:
    """The numbers of requests of one kind. Always accepted = completed + failed + those under way."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def under_way(self) -> int:
        return self.accepted - self.completed - self.failed


class Fleet(EngineClient):
    """Replicas behind the interface of one engine. It is a context manager, whose exit ends the replicas.

    Args:
        engine: The arguments of every `EngineActor`.
        num_replicas: The number of replicas.
        placement: What each replica needs of the cluster.
        order: "rolling": each replica exchanges weights between its own requests, while the others go on. "barrier": no replica
            starts a sample before all have exchanged.
        max_staleness: The number of versions by which a replica may be behind and still be given requests; None: any.
        patience_s: The seconds for which a replica may be silent before it is replaced.

    Raises:
        FlowrollError: The replicas cannot be started.
    """

    def __init__(
        self,
        engine: Mapping[str, Any],
        *,
        num_replicas: int,
        placement: Placement,
        order: UpdateOrder = "rolling",
        max_staleness: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        assert num_replicas >= 1
        self._engine, self._placement, self._order, self._patience_s = dict(engine), placement, order, patience_s
        self._wanted, self._max_staleness = num_replicas, max_staleness
        self._numbers, self._calls = itertools.count(), itertools.count()
        self._replicas: dict[str, ActorReplica] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._statuses: dict[str, EngineStatus] = {}
        self._requests, self._scores = _Tally(), _Tally()
        self._failures: Counter[str] = Counter()
        self._by_version: Counter[str] = Counter()
        self._num_lost = self._num_retried = self._num_split = 0
        self._is_draining = self._is_closed = self._is_holding = False
        self._paused: str | None = None
        self._memory_mode: Any = None
        self._uploads: dict[str, Upload] = {}
        self._versions, self._log = VersionSequence(), ChangeLog()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flowroll-fleet", daemon=True)
        self._thread.start()
        try:
            self._on_loop(self._start()).result()
        except BaseException:
            self.close(timeout_s=0)
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The interface of an engine

    @property
    @override
    def failure(self) -> FlowrollError | None:
        return None

    @override
    def on_failure(self, listener: FailureListener) -> None:
        # A fleet without replicas goes on: they are replaced.
        pass

    @override
    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> CallFuture[Any]:
        future: CallFuture[Any] = CallFuture()
        future.number = next(self._calls)
        try:
            self._loop.call_soon_threadsafe(self._begin, future, method, args, options)
        except RuntimeError:  # the loop is closed
            future.end(None, _shutting_down())
        return future

    @override
    def cancel(self, future: Future[Any]) -> None:
        assert isinstance(future, CallFuture)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel, future.number)

    @override
    def close(self, *, timeout_s: float = 10.0) -> bool:
        if self._is_closed:
            return True
        self._is_closed = True
        with contextlib.suppress(TimeoutError):
            self._on_loop(self._end()).result(max(timeout_s, 1.0))
        for one in list(self._replicas.values()):
            one.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(max(timeout_s, 1.0))
        return not self._thread.is_alive()

    # What a fleet has beside it

    def describe(self) -> FleetInfo:
        """Returns the replicas and their state. May be called from any thread."""
        found = self._on_loop(self._described()).result()
        assert isinstance(found, FleetInfo)
        return found

    def resize(self, num_replicas: int) -> None:
        """Changes the number of replicas under traffic; the ones that are left over finish what they were given.

        It returns once the new ones take requests, or the others have ended.

        Args:
            num_replicas: The number of replicas, at least 1.
        """
        assert num_replicas >= 1
        self._on_loop(self._resize(num_replicas)).result()

    def _on_loop(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # Calls

    def _begin(self, future: CallFuture[Any], method: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._is_closed:
            future.end(None, _shutting_down())
            return
        task = self._loop.create_task(self._answer(future, method, args, options))
        self._tasks[future.number] = task
        task.add_done_callback(lambda _: self._tasks.pop(future.number, None))

    def _cancel(self, number: int) -> None:
        if (task := self._tasks.get(number)) is not None:
            task.cancel()

    async def _answer(self, future: CallFuture[Any], method: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        spans: list[StageSpan] = []
        try:
            if method in ("submit", "submit_scores"):
                result = await getattr(self, f"_{method}")(*args, spans=spans, **options)
            else:
                own = self._of_one(method) if method in _OF_ONE else getattr(self, f"_{method}")
                result = await own(*args, **options)
        except asyncio.CancelledError:
            future.end(None, _shutting_down() if self._is_closed else cancelled(), tuple(spans))
        except FlowrollError as error:
            future.end(None, error, tuple(spans))
        except ReplicaLostError as error:
            future.end(None, _none_left(error), tuple(spans))
        except BaseException as error:
            _log.exception("a call of the fleet failed")
            future.end(None, engine_error(error), tuple(spans))
        else:
            future.end(result, None, tuple(spans))

    # Requests

    async def _submit(
        self, plan: RequestPlan, kind: str, *, timeout_s: float | None = None, spans: list[StageSpan]
    ) -> list[Any]:
        self._check_accepting()
        with self._counted(self._requests):
            minimum = plan.params.min_weight_version
            parts = await self._placed(len(plan.samples), plan.num_steps_taken, minimum)
            self._num_split += len(parts) > 1
            deadline_s = None if timeout_s is None else self._loop.time() + timeout_s
            run = _Run(plan=plan, kind=kind, deadline_s=deadline_s)
            answers = await _all_of([self._part(run, part, minimum, spans) for part in parts])
            answers = await self._of_one_version(run, parts, answers, spans)
        results = [result for answer in answers for result in answer]
        self._by_version.update(result.weight_version for result in results)
        while len(self._by_version) > 64:
            del self._by_version[next(iter(self._by_version))]
        return results

    async def _of_one_version(
        self, run: _Run, parts: Sequence[Part], answers: list[list[Any]], spans: list[StageSpan]
    ) -> list[list[Any]]:
        """Runs parts again that older weights made than others of the same request: a group is of one version."""
        for _ in range(_MAX_LOSSES):
            versions = [answer[0].weight_version for answer in answers]
            if len(set(versions)) == 1 or run.plan.params.policy is not None:
                return answers
            newest = max(versions, key=self._versions.number_of)
            again = [index for index, version in enumerate(versions) if version != newest]
            found = await _all_of([self._again(run, parts[index].samples, newest, spans) for index in again])
            for index, answer in zip(again, found, strict=True):
                answers[index] = answer
        raise EngineError(
            "the samples of a request must be of one version of the weights, got changes faster than requests; send smaller "
            "groups, or update less often."
        )

    async def _again(self, run: _Run, samples: range, minimum: str | None, spans: list[StageSpan]) -> list[Any]:
        steps = run.plan.num_steps_taken * len(samples) // len(run.plan.samples)
        (part,) = await self._placed(len(samples), steps, minimum, max_parts=1)
        return await self._part(run, replace(part, samples=samples), minimum, spans)

    async def _part(self, run: _Run, part: Part, minimum: str | None, spans: list[StageSpan]) -> list[Any]:
        """Runs samples of a request on a replica, and on another one if that ends or does not take them."""
        plan = run.plan.part(part.samples)
        asked: list[FlowrollError] = []
        tried: set[str] = set()
        num_lost = 0
        while True:
            replica = self._replicas.get(part.replica)
            try:
                if replica is None:
                    raise ReplicaLostError(part.replica)
                left_s = None if run.deadline_s is None else run.deadline_s - self._loop.time()
                if left_s is not None and left_s <= 0:
                    raise too_late(0.0)
                outcome = await replica.ask("submit", (plan, run.kind), {"timeout_s": left_s})
            except ReplicaLostError as error:
                if replica is not None:
                    self._lose(replica, error)
                num_lost += 1
                self._num_retried += 1
                if num_lost >= _MAX_LOSSES:
                    raise RankLostError(
                        f"the request must be run by a replica, got the end of {num_lost} of them; see their logs."
                    ) from None
            except (QueueFullError, ShuttingDownError, OutdatedWeightsError) as error:
                asked.append(error)
                tried.add(part.replica)
            else:
                spans[:] = _latest(spans, list(local_spans(outcome)))
                return list(outcome.result)
            finally:
                self._router.release(part)
            found = await self._placed(len(part.samples), part.image_steps, minimum, max_parts=1, but=tried)
            if not found:
                raise soonest(asked)
            part = replace(found[0], samples=part.samples)

    async def _placed(
        self, num_samples: int, image_steps: int, minimum: str | None, *, max_parts: int | None = None, but: Any = ()
    ) -> list[Part]:
        """Finds replicas for samples. A request that was taken before waits for a replica, if none is there."""
        give_up_s = self._loop.time() + _NO_REPLICA_S
        while True:
            try:
                return self._router.place(num_samples, image_steps, minimum=minimum, max_parts=max_parts, but=but)
            except OutdatedWeightsError:
                if not self._changing.locked():
                    raise
                # The version may be that of the change that is being made.
                async with self._changing:
                    pass
                return self._router.place(num_samples, image_steps, minimum=minimum, max_parts=max_parts, but=but)
            except QueueFullError:
                if max_parts is None or self._loop.time() > give_up_s:
                    raise
                await asyncio.sleep(0.05)

    async def _submit_scores(self, plan: Any, *, timeout_s: float | None = None, spans: list[StageSpan]) -> Any:
        self._check_accepting()
        with self._counted(self._scores):
            steps = sum(len(sample.steps) for sample in plan.params.samples)
            options = {"timeout_s": timeout_s}
            return await self._somewhere("submit_scores", (plan,), options, steps, plan.params.min_weight_version)

    def _of_one(self, method: str) -> Callable[..., Awaitable[Any]]:
        """Returns what calls a method on one replica."""

        async def ask(*args: Any, **options: Any) -> Any:
            return await self._somewhere(method, args, options, 1)

        return ask

    async def _somewhere(
        self, method: str, args: tuple[Any, ...], options: Mapping[str, Any], steps: int, minimum: str | None = None
    ) -> Any:
        asked: list[FlowrollError] = []
        tried: set[str] = set()
        for _ in range(_MAX_LOSSES + len(self._replicas)):
            found = await self._placed(1, steps, minimum, max_parts=1, but=tried)
            if not found:
                raise soonest(asked)
            replica = self._replicas.get(found[0].replica)
            try:
                if replica is not None:
                    return (await replica.ask(method, args, options)).result
            except ReplicaLostError as error:
                assert replica is not None
                self._lose(replica, error)
            except (QueueFullError, ShuttingDownError, OutdatedWeightsError) as error:
                asked.append(error)
                tried.add(found[0].replica)
            finally:
                self._router.release(found[0])
        raise RankLostError("a call must be answered by a replica, got the end of several; see their logs.")

    @contextlib.contextmanager
    def _counted(self, tally: _Tally) -> Any:
        tally.accepted += 1
        try:
            yield
        except BaseException as error:
            tally.failed += 1
            self._failures[getattr(error, "code", cancelled().code)] += 1
            raise
        tally.completed += 1

    # State

    async def _status(self) -> EngineStatus:
        ready = self._ready()
        found = await asyncio.gather(*(self._state_of(one) for one in ready), return_exceptions=True)
        states = [one for one in found if isinstance(one, EngineStatus)]
        loads = [one.load for one in states]
        return EngineStatus(
            load=self._load(loads),
            oldest_waiting_s=max((one.oldest_waiting_s for one in states), default=0.0),
            weight_version=self._versions.current,
            memory_mode=self._memory_mode,
            is_alive=True,
            is_accepting=not self._is_draining and bool(ready),
        )

    def _load(self, loads: Sequence[LoadStats]) -> LoadStats:
        batches: Counter[int] = Counter()
        stages: Counter[Any] = Counter()
        for load in loads:
            batches.update(load.batches)
            stages.update(load.stage_s)
        waits = [load.oldest_waiting_since_s for load in loads if load.oldest_waiting_since_s is not None]
        one, other = self._requests, self._scores
        pending = min(one.under_way, sum(load.requests.pending for load in loads))
        return LoadStats(
            requests=RequestCounts(
                accepted=one.accepted,
                completed=one.completed,
                failed=one.failed,
                pending=pending,
                running=one.under_way - pending,
            ),
            log_probs=RequestCounts(
                accepted=other.accepted, completed=other.completed, failed=other.failed, pending=other.under_way
            ),
            oldest_waiting_since_s=min(waits, default=None),
            running_samples=sum(load.running_samples for load in loads),
            batches=dict(batches),
            failures=dict(self._failures),
            stage_s={**LoadStats().stage_s, **stages},
            is_paused=self._paused is not None,
            is_holding=self._is_holding,
        )

    async def _state_of(self, replica: ActorReplica) -> EngineStatus:
        async with asyncio.timeout(2.0):
            self._statuses[replica.id] = status = await replica.status()
        return status

    async def _abort(self, request_id: str | None) -> int:
        # A request that several replicas run counts once for each.
        return sum((await self._on_all("abort", request_id)).values())

    async def _pause(self, mode: str) -> None:
        self._paused = mode
        await self._on_all("pause", mode)

    async def _resume(self) -> None:
        self._paused = None
        await self._on_all("resume")

    async def _hold_starts(self, is_held: bool) -> None:
        self._is_holding = is_held
        await self._on_all("hold_starts", is_held)

    async def _drain(self) -> None:
        self._is_draining = True

    async def _on_all(self, method: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Calls a method on every replica that takes requests, and returns the results of those that live."""
        return await self._each(lambda replica: replica.call(method, *args, **options))

    # Changes of weights, adapters, policies and memory

    async def _update_from_disk(self, files: Any, weight_version: str | None, mode: Any) -> Any:
        return await self._change(FromDisk(files, mode), "weights", files.module, weight_version)

    async def _load_adapter(self, files: Any, name: str, *, merged: bool, weight_version: str | None, mode: Any) -> Any:
        change = AdapterLoad("stage_adapter", (files, name), merged=merged, mode=mode)
        return await self._change(change, "adapter", name, weight_version)

    async def _load_sent_adapter(
        self, weights: Any, config: str, name: str, *, merged: bool, weight_version: str | None, mode: Any
    ) -> Any:
        change = AdapterLoad("stage_sent_adapter", (await self._stored(weights), config, name), merged=merged, mode=mode)
        return await self._change(change, "adapter", name, weight_version)

    async def _unload_adapter(self, name: str, *, weight_version: str | None, mode: Any) -> Any:
        return await self._change(AdapterUnload(name, mode), "unload", name, weight_version)

    async def _copy_policy(self, name: str, **options: Any) -> Any:
        return await self._change_policy("policy", PolicyOperation("copy_policy", name, options), name)

    async def _average_policy(self, name: str, **options: Any) -> Any:
        return await self._change_policy("policy", PolicyOperation("average_policy", name, options), name)

    async def _drop_policy(self, name: str, **options: Any) -> Any:
        return await self._change_policy("drop_policy", PolicyOperation("drop_policy", name, options), name)

    async def _change(
        self, change: Change, kind: ChangeKind, name: str, weight_version: str | None, *, is_whole: bool = True
    ) -> Any:
        """Makes a change on all replicas or on none, and gives all of them the same next version."""
        self._check_accepting()
        async with self._changing:
            change.version, number = self._versions.following(weight_version), self._versions.number + 1
            steps = _Versioned(change, lambda replica: self._router.set_version(replica, change.version, number))
            async with self._barrier():
                applied = await change_all(steps, self._ready())
            self._versions.advance(change.version)
            self._log.add(Changed(kind=kind, name=name, is_whole=is_whole, steps=change))
            self._replace(applied.unfit)
        return next(iter(applied.results.values()))

    async def _change_policy(self, kind: ChangeKind, operation: PolicyOperation, name: str) -> Any:
        self._check_accepting()
        async with self._changing:
            applied = await change_all(operation, self._ready())
            self._log.add(Changed(kind=kind, name=name, steps=operation))
            self._replace(applied.unfit)
        return next(iter(applied.results.values()))

    @contextlib.asynccontextmanager
    async def _barrier(self) -> Any:
        if self._order == "rolling":
            yield
            return
        await self._on_all("hold_starts", True)
        try:
            yield
        finally:
            await self._on_all("hold_starts", self._is_holding)

    async def _sleep(self, mode: str) -> Any:
        async with self._changing:
            try:
                found = await self._on_all("sleep", mode)
            except FlowrollError:
                await self._on_all("wake")
                raise
            self._memory_mode = next(iter(found.values())).mode if found else mode
            return _summed(list(found.values()))

    async def _wake(self) -> Any:
        async with self._changing:
            found = await self._on_all("wake")
            self._memory_mode = None
            return _summed(list(found.values()))

    async def _checksums(self, modules: Sequence[str]) -> Any:
        return await self._of_all("checksums", modules)

    async def _verify_weights(self, expected: Any, module: str) -> Any:
        return await self._of_all("verify_weights", list(expected), module)

    async def _differing_weights(self, expected: Mapping[str, str], module: str) -> Any:
        return await self._of_all("differing_weights", dict(expected), module)

    async def _of_all(self, method: str, *args: Any) -> Any:
        """Asks all replicas about their weights, between two changes."""
        async with self._changing:
            found = await self._on_all(method, *args)
        answers = list(found.values())
        if not answers:
            raise _none_left(ReplicaLostError("none is ready"))
        if any(answer != answers[0] for answer in answers):
            raise EngineError(f"the weights of all replicas must be the same, got others in some of {', '.join(found)}.")
        return answers[0]

    # Weights that arrive in buckets

    async def _open_update(self, module: str, *, partial: bool) -> OpenedUpdate:
        self._check_accepting()
        async with self._changing:
            upload = Upload(module, partial=partial)
            opened = await self._each(upload.open)
            if not opened:
                raise _none_left(ReplicaLostError("none is ready"))
            upload.opened = next(iter(opened.values()))
            self._uploads[upload.opened.update_id] = upload
            return upload.opened

    async def _claim_bucket(self, update_id: str, heads: Any) -> None:
        async with self._changing:
            upload, bucket = self._upload(update_id), Bucket(heads)
            # Whether a bucket fits depends on the module and on the buckets before it, which all replicas have alike.
            await self._each(lambda replica: upload.claim(replica, bucket))
            upload.buckets.append(bucket)

    async def _put_bucket(self, update_id: str, heads: Any, memory: Any) -> UpdateProgress:
        async with self._changing:
            upload = self._upload(update_id)
            bucket = next(one for one in upload.buckets if one.heads == heads and one.stored is None)
            bucket.stored = await self._stored(memory)
            try:
                found = await self._each(lambda replica: upload.put(replica, bucket))
            except _MixedError:
                await self._end_upload(update_id)
                raise
            except FlowrollError:
                # All have refused it, and its tensors may come again.
                upload.buckets.remove(bucket)
                raise
            progress = next(iter(found.values()))
            assert isinstance(progress, UpdateProgress)
            return replace(progress, weight_version=self._versions.current)

    async def _drop_bucket(self, update_id: str, heads: Any) -> None:
        async with self._changing:
            if (upload := self._uploads.get(update_id)) is not None:
                for bucket in [one for one in upload.buckets if one.heads == heads and one.stored is None]:
                    upload.buckets.remove(bucket)
                    await self._each(functools.partial(upload.drop_bucket, bucket=bucket))

    async def _commit_update(self, update_id: str, weight_version: str | None, mode: Any) -> Any:
        upload = self._upload(update_id)
        upload.mode = mode
        try:
            changed = await self._change(upload, "weights", upload.module, weight_version, is_whole=not upload.partial)
        except FlowrollError:
            async with self._changing:
                if not all(upload.is_open_on(one.id) for one in self._ready()):
                    await self._end_upload(update_id)
            raise
        self._uploads.pop(update_id, None)
        return changed

    async def _is_open(self, update_id: str) -> bool:
        return update_id in self._uploads

    async def _drop_update(self, update_id: str) -> None:
        async with self._changing:
            await self._end_upload(update_id)

    async def _end_upload(self, update_id: str) -> None:
        if (upload := self._uploads.pop(update_id, None)) is not None:
            await self._each(upload.abandon)

    def _upload(self, update_id: str) -> Upload:
        if (upload := self._uploads.get(update_id)) is None:
            raise NotFoundError(
                f"update_id must be of an update that is under way, got {update_id[:80]}; it was committed, aborted or dropped "
                "after a silence: begin another.",
                field="update_id",
            )
        return upload

    async def _each(self, action: Callable[[ActorReplica], Awaitable[Any]]) -> dict[str, Any]:
        """Does something with every replica that takes requests; one that ends meanwhile is replaced.

        Raises:
            FlowrollError: All have refused it.
            _MixedError: Some have.
        """
        ready = self._ready()
        found = await asyncio.gather(*(action(one) for one in ready), return_exceptions=True)
        done: dict[str, Any] = {}
        errors: list[BaseException] = []
        for replica, one in zip(ready, found, strict=True):
            if isinstance(one, ReplicaLostError):
                self._lose(replica, one)
            elif isinstance(one, BaseException):
                errors.append(one)
            else:
                done[replica.id] = one
        if errors and done and isinstance(errors[0], FlowrollError):
            raise _MixedError(f"all replicas must take it or none, got a refusal of some: {errors[0]}")
        if errors:
            raise errors[0]
        return done

    async def _stored(self, value: Any) -> Any:
        """Stores a value once, for all replicas."""
        return await asyncio.to_thread(ray.put, pack(value))

    # What belongs to one engine alone

    async def _open_sent(self, *_: Any, **options: Any) -> Any:
        raise ForbiddenError(_UNSHARED.format("handles of one machine's memory"))

    async def _join_group(self, *_: Any, **options: Any) -> Any:
        raise ForbiddenError(_UNSHARED.format("a process group"))

    async def _find_group(self, name: str) -> str:
        raise NotFoundError(f"group_name must be of a group that was joined, got {name[:80]}; a fleet joins none.")

    async def _leave_group(self, name: str) -> None:
        await self._find_group(name)

    async def _leave_groups(self) -> None:
        pass

    # Replicas

    async def _start(self) -> None:
        self._changing = asyncio.Lock()
        first = [self._launch() for _ in range(self._wanted)]
        facts = await asyncio.gather(*(one.wait() for one in first))
        self.facts = facts[0]
        self._router = Router(
            self._versions, max_batch_samples=self.facts.batching.max_batch_samples, max_staleness=self._max_staleness
        )
        for one in first:
            await self._join(one)
        self._spawn(self._watch())

    def _launch(self) -> ActorReplica:
        replica = ActorReplica(next(self._numbers), self._engine, self._placement)
        self._replicas[replica.id] = replica
        return replica

    async def _join(self, replica: ActorReplica) -> None:
        """Gives a replica what the others have, and then requests."""
        async with self._changing:
            _check_same(replica, self.facts)
            for one in self._log.changes:
                await one.steps.stage(replica)
                await one.steps.exchange(replica)
            versions = self._versions
            if versions.number:
                await replica.call("restore_versions", versions.current, versions.highest, versions.names)
                await self._compare(replica)
            for upload in self._uploads.values():
                await upload.open(replica)
            if self._memory_mode is not None:
                await replica.call("sleep", self._memory_mode)
            if self._paused is not None:
                await replica.call("pause", self._paused)
            if self._is_holding:
                await replica.call("hold_starts", True)
            replica.state = "ready"
            self._router.join(replica.id, version=versions.current, number=versions.number)
        _log.info("%s takes requests, with weights of version %s", replica.id, versions.current)

    async def _compare(self, replica: ActorReplica) -> None:
        """Refuses a replica whose weights are not those of the others: a file may have changed since they read it."""
        if self._memory_mode is not None or not (others := self._ready()):
            return
        modules = list(self.facts.modules)
        mine, theirs = await asyncio.gather(replica.call("checksums", modules), others[0].call("checksums", modules))
        if mine != theirs:
            raise EngineError(f"{replica.id} must get the weights of {others[0].id}, got others; were files changed since?")

    def _replace(self, unfit: Sequence[str]) -> None:
        for name in unfit:
            if (replica := self._replicas.get(name)) is not None:
                self._lose(replica, ReplicaLostError(f"{name} did not take a change that others took"))

    def _lose(self, replica: ActorReplica, reason: BaseException) -> None:
        """Ends a replica, and has another one take its place."""
        if self._replicas.pop(replica.id, None) is None:
            return
        was_wanted = replica.state != "draining"
        self._router.leave(replica.id)
        self._statuses.pop(replica.id, None)
        replica.kill()
        self._num_lost += 1
        _log.error("%s is lost: %s", replica.id, reason)
        if was_wanted and not self._is_closed:
            self._spawn(self._refill())

    async def _refill(self) -> None:
        """Starts a replica in the place of one that ended, as often as it takes."""
        rest_s = _FIRST_REST_S
        while not self._is_closed and self._num_wanted_there() < self._wanted:
            replica = self._launch()
            try:
                await replica.wait()
                await self._join(replica)
                return
            except (FlowrollError, ReplicaLostError) as error:
                _log.error("%s cannot take a place in the fleet: %s", replica.id, error)
                self._replicas.pop(replica.id, None)
                replica.kill()
            await asyncio.sleep(rest_s)
            rest_s = min(2 * rest_s, _MAX_REST_S)

    def _num_wanted_there(self) -> int:
        return sum(one.state in ("starting", "ready") for one in self._replicas.values())

    async def _resize(self, num_replicas: int) -> None:
        self._wanted = num_replicas
        there = [one for one in self._replicas.values() if one.state in ("starting", "ready")]
        if len(there) <= num_replicas:
            await asyncio.gather(*(self._refill() for _ in range(num_replicas - len(there))))
            return
        loads = {one.id: one.image_steps for one in self._router.replicas}
        leaving = sorted(there, key=lambda one: loads.get(one.id, 0))[: len(there) - num_replicas]
        await asyncio.gather(*(self._retire(one) for one in leaving))

    async def _retire(self, replica: ActorReplica) -> None:
        # Not in the middle of a change, of which it is a part.
        async with self._changing:
            replica.state = "draining"
            load = self._router.drain(replica.id)
        while load is not None and load.num_requests and replica.id in self._replicas:
            await asyncio.sleep(0.05)
        if self._replicas.pop(replica.id, None) is not None:
            replica.kill()

    async def _watch(self) -> None:
        """Replaces replicas that are silent for too long."""
        heard: dict[str, float] = {}
        while True:
            await asyncio.sleep(_PULSE_S)
            for replica in self._ready():
                heard.setdefault(replica.id, self._loop.time())
                try:
                    await self._state_of(replica)
                    heard[replica.id] = self._loop.time()
                except TimeoutError:
                    if self._loop.time() - heard[replica.id] > self._patience_s:
                        self._lose(replica, ReplicaLostError(f"it is silent for {self._patience_s:g} s"))
                except (ReplicaLostError, FlowrollError) as error:
                    self._lose(replica, error)

    def _ready(self) -> list[ActorReplica]:
        return [one for one in self._replicas.values() if one.state == "ready"]

    async def _described(self) -> FleetInfo:
        loads = {one.id: one for one in self._router.replicas}
        now_s = time.monotonic()
        return FleetInfo(
            weight_version=self._versions.current,
            version_number=self._versions.number,
            replicas=tuple(
                ReplicaInfo(
                    id=one.id,
                    state=one.state,
                    weight_version=None if (load := loads.get(one.id)) is None else load.version,
                    version_number=None if load is None else load.number,
                    image_steps=0 if load is None else load.image_steps,
                    num_requests=0 if load is None else load.num_requests,
                    node=one.node,
                    pid=one.pid,
                    uptime_s=now_s - one.started_s,
                )
                for one in self._replicas.values()
            ),
            num_lost=self._num_lost,
            num_retried=self._num_retried,
            num_split=self._num_split,
            samples_by_version=dict(self._by_version),
        )

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _end(self) -> None:
        ending = [*self._tasks.values(), *self._background]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _check_accepting(self) -> None:
        if self._is_draining or self._is_closed:
            raise _shutting_down()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A request that is being run."""

    plan: RequestPlan
    kind: str
    deadline_s: float | None


class _MixedError(EngineError):
    """Some replicas have refused what others have taken."""


class _Versioned:
    """A change that tells the router of each replica that has made it."""

    def __init__(self, change: Change, note: Callable[[str], None]) -> None:
        self._change, self._note = change, note
        self.stage, self.drop = change.stage, change.drop

    async def exchange(self, member: Any) -> Any:
        result = await self._change.exchange(member)
        self._note(member.id)
        return result


async def _all_of(work: Sequence[Any]) -> list[Any]:
    """Returns all results; the first error cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _latest(one: list[StageSpan], other: list[StageSpan]) -> list[StageSpan]:
    """Returns the spans of the part of a request that ended later."""
    return max(one, other, key=lambda spans: spans[-1].end_s if spans else 0.0)


def _check_same(replica: ActorReplica, facts: EngineFacts) -> None:
    """Refuses a replica whose samples would have other bits than the fleet's, because of what is on its node."""
    assert replica.facts is not None
    for name in ("family", "variant", "pipeline", "dtype", "parameters", "layout", "limits", "versions"):
        mine, theirs = getattr(replica.facts.info, name), getattr(facts.info, name)
        if mine != theirs:
            raise EngineError(f"{replica.id} must have the fleet's {name}, {theirs}, got {mine}; look at its node.")


def _summed(changes: Sequence[Any]) -> Any:
    """Returns the change of memory of all replicas together, which went on at the same time."""
    if not changes:
        raise _none_left(ReplicaLostError("none is ready"))
    return replace(changes[0], num_bytes=sum(one.num_bytes for one in changes), seconds=max(one.seconds for one in changes))


def _none_left(error: ReplicaLostError) -> RankLostError:
    return RankLostError(f"a replica must live to answer, got the end of those that were asked ({error}); try again.")


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server must run to answer, got a shutdown; send the request to another replica.")
