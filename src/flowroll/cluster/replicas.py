"""The replicas of a fleet: started, given what the others have, watched, replaced, and taken out."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from flowroll.cluster.changes import Upload
from flowroll.cluster.replica import ActorReplica, Placement
from flowroll.cluster.routing import Router
from flowroll.cluster.updates import ChangeLog, ReplicaLostError
from flowroll.cluster.version_file import VersionFile
from flowroll.engine.scheduler import PauseMode
from flowroll.engine.service import EngineFacts, EngineStatus
from flowroll.engine.weights.offload import SleepMode
from flowroll.engine.weights.versions import VersionState, WeightVersions
from flowroll.errors import EngineError, FlowrollError

_log = logging.getLogger(__name__)
# A replica is asked for its state so often; one that is silent for the patience is replaced.
_PULSE_S = 1.0
_STATUS_S = 2.0
# Between two attempts to replace a replica.
_FIRST_REST_S, _MAX_REST_S = 0.5, 30.0


class MixedError(EngineError):
    """Some replicas have refused what others have taken."""


class ReplicaSet:
    """The replicas, and all that a new one has to be given. It is used on one event loop.

    Args:
        engine: The arguments of every `EngineActor`.
        num_replicas: The number of replicas.
        placement: What each replica needs of the cluster.
        max_staleness: The number of versions by which a replica may be behind and still be given requests; None: any.
        patience_s: The seconds for which a replica may be silent before it is replaced.
        kept: The file that keeps the versions beyond the end of the fleet; None: they start anew with each fleet.

    Attributes:
        facts: The facts about the engines, once they are up.
        router: Gives them requests.
        versions: The versions of their weights.
        log: The changes that a new one has to make.
        uploads: The updates whose tensors arrive, by their ids.
        changing: Held by what changes all of them, or must not see them change.
        there: All that were started and have not ended, by their ids.
        paused: How generation is paused, and whether new requests are refused; None: it is not.
        memory_mode: Where the weights are while their memory is released; None: they are in place.
        is_holding: Whether no request is admitted.
        is_closed: Whether none is replaced any more.
        num_lost: The number of those that have ended against our will.
        background: The tasks that replace and watch them.
    """

    facts: EngineFacts
    router: Router

    def __init__(
        self,
        engine: Mapping[str, Any],
        *,
        num_replicas: int,
        placement: Placement,
        max_staleness: int | None = None,
        patience_s: float = 60.0,
        kept: VersionFile | None = None,
    ) -> None:
        assert num_replicas >= 1
        self._engine, self._placement, self._patience_s = dict(engine), placement, patience_s
        self._wanted, self._max_staleness = num_replicas, max_staleness
        self._numbers = itertools.count()
        self._kept = kept
        self.versions, self.log = WeightVersions(None if kept is None else kept.restarted()), ChangeLog()
        self.uploads: dict[str, Upload] = {}
        self.changing = asyncio.Lock()
        self.there: dict[str, ActorReplica] = {}
        self.paused: tuple[PauseMode, bool] | None = None
        self.memory_mode: SleepMode | None = None
        self.is_holding = self.is_closed = False
        self.num_lost = 0
        self.background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Starts the replicas, and returns once all take requests."""
        first = [self._launch() for _ in range(self._wanted)]
        facts = await asyncio.gather(*(one.wait() for one in first))
        # No process of this machine is the engine.
        self.facts = dataclasses.replace(facts[0], pid=0, gpu_uuid=None)
        self.router = Router(
            self.versions, max_batch_samples=self.facts.batching.max_batch_samples, max_staleness=self._max_staleness
        )
        for one in first:
            await self._join(one)
        self._spawn(self._watch())

    def _launch(self) -> ActorReplica:
        replica = ActorReplica(next(self._numbers), self._engine, self._placement)
        self.there[replica.id] = replica
        return replica

    async def _join(self, replica: ActorReplica) -> None:
        """Gives a replica what the others have, and then requests."""
        async with self.changing:
            check_same(replica, self.facts)
            for one in self.log.changes:
                await one.steps.stage(replica)
                await one.steps.exchange(replica)
            versions = self.versions.state
            if versions.newest:
                await replica.call("restore_versions", versions)
                await self._compare(replica)
            for upload in self.uploads.values():
                await upload.open(replica)
            if self.memory_mode is not None:
                await replica.call("sleep", self.memory_mode)
            applied: tuple[Any, bool] | None = None
            # They may change meanwhile, without waiting for this.
            while applied != (wanted := (self.paused, self.is_holding)):
                await (replica.call("resume") if self.paused is None else _pause(replica, *self.paused))
                await replica.call("hold_starts", wanted[1])
                applied = wanted
            replica.state = "ready"
            self.router.join(replica.id, version=versions.current, number=versions.number)
        _log.info("%s takes requests, with weights of version %s", replica.id, versions.current)

    async def _compare(self, replica: ActorReplica) -> None:
        """Refuses a replica whose weights are not those of the others: a file may have changed since they read it."""
        if self.memory_mode is not None or not (others := self.ready()):
            return
        modules = list(self.facts.modules)
        mine, theirs = await asyncio.gather(replica.call("checksums", modules), others[0].call("checksums", modules))
        if mine != theirs:
            raise EngineError(f"{replica.id} must get the weights of {others[0].id}, got others; were files changed since?")

    def keep(self, versions: VersionState) -> None:
        """Writes versions down, before any replica has the newest one, so that its number is given to no other."""
        if self._kept is not None:
            self._kept.write(versions)

    def replace(self, unfit: Sequence[str]) -> None:
        """Ends the replicas that did not take a change, and has others take their places."""
        for name in unfit:
            if (replica := self.there.get(name)) is not None:
                self.lose(replica, ReplicaLostError(f"{name} did not take a change that others took"))

    def lose(self, replica: ActorReplica, reason: BaseException) -> None:
        """Ends a replica, and has another one take its place."""
        if self.there.pop(replica.id, None) is None:
            return
        was_wanted = replica.state != "draining"
        self.router.leave(replica.id)
        replica.kill()
        self.num_lost += 1
        _log.error("%s is lost: %s", replica.id, reason)
        if was_wanted and not self.is_closed:
            self._spawn(self._refill())

    async def _refill(self) -> None:
        """Starts a replica in the place of one that ended, as often as it takes."""
        rest_s = _FIRST_REST_S
        while not self.is_closed and self._num_wanted_there() < self._wanted:
            replica = self._launch()
            try:
                await replica.wait()
                await self._join(replica)
                return
            except (FlowrollError, ReplicaLostError) as error:
                _log.error("%s cannot take a place in the fleet: %s", replica.id, error)
                self.there.pop(replica.id, None)
                replica.kill()
            await asyncio.sleep(rest_s)
            rest_s = min(2 * rest_s, _MAX_REST_S)

    def _num_wanted_there(self) -> int:
        return sum(one.state in ("starting", "ready") for one in self.there.values())

    async def resize(self, num_replicas: int) -> None:
        """Changes the number of replicas; those that are left over finish what they were given."""
        self._wanted = num_replicas
        there = [one for one in self.there.values() if one.state in ("starting", "ready")]
        if len(there) <= num_replicas:
            await asyncio.gather(*(self._refill() for _ in range(num_replicas - len(there))))
            return
        loads = {one.id: one.image_steps for one in self.router.replicas}
        leaving = sorted(there, key=lambda one: loads.get(one.id, 0))[: len(there) - num_replicas]
        await asyncio.gather(*(self._retire(one) for one in leaving))

    async def _retire(self, replica: ActorReplica) -> None:
        # Not in the middle of a change, of which it is a part.
        async with self.changing:
            replica.state = "draining"
            load = self.router.drain(replica.id)
        while load is not None and load.num_requests and replica.id in self.there:
            await asyncio.sleep(0.05)
        if self.there.pop(replica.id, None) is not None:
            replica.kill()

    async def _watch(self) -> None:
        """Replaces replicas that are silent for too long."""
        heard: dict[str, float] = {}
        while True:
            await asyncio.sleep(_PULSE_S)
            for replica in self.running():
                heard.setdefault(replica.id, asyncio.get_running_loop().time())
                try:
                    await self.state_of(replica)
                    heard[replica.id] = asyncio.get_running_loop().time()
                except TimeoutError:
                    if asyncio.get_running_loop().time() - heard[replica.id] > self._patience_s:
                        self.lose(replica, ReplicaLostError(f"it is silent for {self._patience_s:g} s"))
                except (ReplicaLostError, FlowrollError) as error:
                    self.lose(replica, error)

    def ready(self) -> list[ActorReplica]:
        """Returns the replicas that take requests."""
        return [one for one in self.there.values() if one.state == "ready"]

    def running(self) -> list[ActorReplica]:
        """Returns the replicas that run requests, also those that take no more."""
        return [one for one in self.there.values() if one.state in ("ready", "draining")]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def each(
        self, action: Callable[[ActorReplica], Awaitable[Any]], members: Sequence[ActorReplica] | None = None
    ) -> dict[str, Any]:
        """Does something with every replica that takes requests, or with these; one that ends meanwhile is replaced.

        Raises:
            FlowrollError: All have refused it.
            MixedError: Some have.
        """
        members = self.ready() if members is None else members
        found = await asyncio.gather(*(action(one) for one in members), return_exceptions=True)
        done: dict[str, Any] = {}
        errors: list[BaseException] = []
        for replica, one in zip(members, found, strict=True):
            if isinstance(one, ReplicaLostError):
                self.lose(replica, one)
            elif isinstance(one, BaseException):
                errors.append(one)
            else:
                done[replica.id] = one
        if errors and done and isinstance(errors[0], FlowrollError):
            raise MixedError(f"all replicas must take it or none, got a refusal of some: {errors[0]}")
        if errors:
            raise errors[0]
        return done

    async def on_all(self, method: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Calls a method on every replica that takes requests, and returns the results of those that live."""
        return await self.each(lambda replica: replica.call(method, *args, **options))

    async def pause(self, mode: PauseMode, *, refuses: bool) -> None:
        """Pauses every replica that runs requests, and those that join later."""
        self.paused = mode, refuses
        await self.each(lambda replica: _pause(replica, mode, refuses), self.running())

    async def on_running(self, method: str, *args: Any) -> dict[str, Any]:
        """Calls a method on every replica that runs requests, for what holds them up or lets them go on.

        One that leaves is among them: paused and not resumed, it would neither finish its requests nor ever leave.
        """
        return await self.each(lambda replica: replica.call(method, *args), self.running())

    async def state_of(self, replica: ActorReplica) -> EngineStatus:
        """Asks a replica for its state.

        Raises:
            TimeoutError: It does not answer soon.
            ReplicaLostError: It has ended.
        """
        async with asyncio.timeout(_STATUS_S):
            return await replica.status()


async def _pause(replica: ActorReplica, mode: PauseMode, refuses: bool) -> None:
    await replica.call("pause", mode, refuses=refuses)


def check_same(replica: ActorReplica, facts: EngineFacts) -> None:
    """Refuses a replica whose samples would have other bits than the fleet's, because of what is on its node."""
    assert replica.facts is not None
    for name in ("family", "variant", "pipeline", "dtype", "parameters", "layout", "limits", "versions"):
        mine, theirs = getattr(replica.facts.info, name), getattr(facts.info, name)
        if mine != theirs:
            raise EngineError(f"{replica.id} must have the fleet's {name}, {theirs}, got {mine}; look at its node.")
