"""A fleet: several replicas as the one engine of a server.

`Fleet` has the interface of an engine, so that the HTTP side is that of a single server, with its routes, dialects, bounds and
errors. Requests are routed (`requests`); what changes weights, adapters, policies or memory is done on all replicas or on none
(`weights`); a replica that ends is replaced by one that gets the fleet's weights before it takes a request (`replicas`). One
event loop, on a thread of its own, owns everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from typing_extensions import override

from flowroll.cluster.groups import FleetGroups
from flowroll.cluster.info import FleetInfo, ReplicaInfo
from flowroll.cluster.replicas import ReplicaSet
from flowroll.cluster.requests import FleetRequests
from flowroll.cluster.updates import ReplicaLostError
from flowroll.cluster.weights import FleetWeights, UpdateOrder, none_left
from flowroll.engine.scheduler import LoadStats, PauseMode, RequestCounts, StageSpan
from flowroll.engine.scheduler.request import cancelled, engine_error
from flowroll.engine.service import CallFuture, EngineClient, EngineStatus
from flowroll.engine.service.client import FailureListener
from flowroll.errors import FlowrollError, ShuttingDownError
from flowroll.exact import GraphCounts

T = TypeVar("T")
_log = logging.getLogger(__name__)
# What any one replica can answer.
_OF_ONE = frozenset({"decode", "probe_generation", "check_adapter", "lora_adapters", "policies"})
_OF_REQUESTS = frozenset({"submit", "submit_scores"})
_OF_GROUPS = frozenset({"join_group", "find_group", "fill_from_group", "fail_group", "leave_group", "leave_groups"})
_OF_STATE = frozenset({"status", "pause", "resume", "hold_starts", "drain"})
# What is refused once the fleet drains.
_TAKEN_NO_MORE = _OF_REQUESTS | {
    "update_from_disk",
    "load_adapter",
    "unload_adapter",
    "copy_policy",
    "average_policy",
    "drop_policy",
    "open_update",
    "commit_update",
}


class Fleet(EngineClient):
    """Replicas behind the interface of one engine. It is a context manager, whose exit ends the replicas.

    Args:
        replicas: The replicas, which are started here.
        order: "rolling": each replica exchanges weights between its own requests, while the others go on. "barrier": no replica
            starts a sample before all have exchanged.

    Raises:
        FlowrollError: The replicas cannot be started.
    """

    def __init__(self, replicas: ReplicaSet, order: UpdateOrder = "rolling") -> None:
        self._replicas = replicas
        self._requests, self._weights = FleetRequests(self._replicas), FleetWeights(self._replicas, order)
        self._groups = FleetGroups(self._replicas, self._weights)
        self._numbers = itertools.count()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._is_draining = self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flowroll-fleet", daemon=True)
        self._thread.start()
        try:
            self._on_loop(self._replicas.start())
        except ReplicaLostError as error:
            self.close(timeout_s=0)
            raise none_left(error) from None
        except BaseException:
            self.close(timeout_s=0)
            raise
        self.facts = self._replicas.facts

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The interface of an engine

    # Each would be a change that a replica that joins later has to make.
    takes_lone_buckets = False

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
        future.number = next(self._numbers)
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
        self._is_closed = self._replicas.is_closed = True
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(max(timeout_s, 1.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(max(timeout_s, 1.0))
        for one in list(self._replicas.there.values()):
            one.kill()
        if is_over := not self._thread.is_alive():
            self._loop.close()
        return is_over

    # What a fleet has beside it

    def describe(self) -> FleetInfo:
        """Returns the replicas and their state. May be called from any thread."""
        return self._on_loop(self._described())

    def resize(self, num_replicas: int) -> None:
        """Changes the number of replicas under traffic; the ones that are left over finish what they were given.

        It returns once the new ones take requests, or the others have ended.

        Args:
            num_replicas: The number of replicas, at least 1.
        """
        assert num_replicas >= 1
        self._on_loop(self._replicas.resize(num_replicas))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Calls

    def _begin(self, future: CallFuture[Any], method: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._is_closed or (self._is_draining and method in _TAKEN_NO_MORE):
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
            result = await self._method(method, spans)(*args, **options)
        except asyncio.CancelledError:
            future.end(None, _shutting_down() if self._is_closed else cancelled(), tuple(spans))
        except FlowrollError as error:
            future.end(None, error, tuple(spans))
        except ReplicaLostError as error:
            future.end(None, none_left(error), tuple(spans))
        except BaseException as error:
            _log.exception("a call of the fleet failed")
            future.end(None, engine_error(error), tuple(spans))
        else:
            future.end(result, None, tuple(spans))

    def _method(self, method: str, spans: list[StageSpan]) -> Callable[..., Awaitable[Any]]:
        """Returns what does for the fleet what a method of `EngineService` does for an engine."""
        if method in _OF_REQUESTS:
            found = getattr(self._requests, method)
            return lambda *args, **options: found(*args, spans=spans, **options)
        if method in _OF_ONE:
            return self._requests.of_one(method)
        asked: Callable[..., Awaitable[Any]]
        if method in _OF_STATE:
            asked = getattr(self, f"_{method}")
        elif method in _OF_GROUPS:
            asked = getattr(self._groups, method)
        else:
            asked = self._requests.abort if method == "abort" else getattr(self._weights, method)
        return asked

    # State

    async def _status(self) -> EngineStatus:
        ready = self._replicas.ready()
        found = await asyncio.gather(*map(self._replicas.state_of, ready), return_exceptions=True)
        states = [one for one in found if isinstance(one, EngineStatus)]
        return EngineStatus(
            load=self._load([one.load for one in states]),
            oldest_waiting_s=max((one.oldest_waiting_s for one in states), default=0.0),
            weight_version=self._replicas.versions.current,
            version_number=self._replicas.versions.state.number,
            memory_mode=self._replicas.memory_mode,
            graphs=GraphCounts.total([one.graphs for one in states]),
            world_size=len(ready),
            is_alive=True,
            is_accepting=not self._is_draining and bool(ready),
        )

    def _load(self, loads: Sequence[LoadStats]) -> LoadStats:
        """Returns the load of all replicas together. Requests are the fleet's own, whatever replicas have come and gone."""
        batches: Counter[int] = Counter()
        stages: Counter[Any] = Counter()
        for load in loads:
            batches.update(load.batches)
            stages.update(load.stage_s)
        waits = [load.oldest_waiting_since_s for load in loads if load.oldest_waiting_since_s is not None]
        samples, scores = self._requests.samples, self._requests.scores
        pending = min(samples.under_way, sum(load.requests.pending for load in loads))
        return LoadStats(
            requests=RequestCounts(
                accepted=samples.accepted,
                completed=samples.completed,
                failed=samples.failed,
                pending=pending,
                running=samples.under_way - pending,
            ),
            log_probs=RequestCounts(
                accepted=scores.accepted, completed=scores.completed, failed=scores.failed, pending=scores.under_way
            ),
            oldest_waiting_since_s=min(waits, default=None),
            running_samples=sum(load.running_samples for load in loads),
            batches=dict(batches),
            failures=dict(self._requests.failures),
            stage_s={**LoadStats().stage_s, **stages},
            is_paused=self._replicas.paused is not None,
            is_holding=self._replicas.is_holding,
        )

    async def _pause(self, mode: PauseMode, *, refuses: bool = True) -> None:
        # Not behind a change, which may wait for requests that are paused; a replica that joins looks at the same mode.
        await self._replicas.pause(mode, refuses=refuses)

    async def _resume(self) -> None:
        self._replicas.paused = None
        await self._replicas.on_running("resume")

    async def _hold_starts(self, is_held: bool) -> None:
        self._replicas.is_holding = is_held
        await self._replicas.on_running("hold_starts", is_held)

    async def _drain(self) -> None:
        self._is_draining = True

    async def _described(self) -> FleetInfo:
        replicas, requests = self._replicas, self._requests
        loads = {one.id: one for one in replicas.router.replicas}
        now_s = time.monotonic()
        return FleetInfo(
            weight_version=replicas.versions.current,
            version_number=replicas.versions.state.number,
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
                for one in replicas.there.values()
            ),
            num_lost=replicas.num_lost,
            num_retried=requests.num_retried,
            num_split=requests.num_split,
        )

    async def _end(self) -> None:
        ending = [*self._tasks.values(), *self._replicas.background]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server must run to answer, got a shutdown; send the request to another replica.")
