"""One replica of a fleet: an `EngineActor` of Ray's, what is known about it, and the errors that tell that it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowroll.cluster.actor import EngineActor, Outcome
from flowroll.cluster.parcel import Parcel
from flowroll.cluster.updates import ReplicaLostError
from flowroll.engine.scheduler import StageSpan
from flowroll.engine.service import EngineFacts, EngineStatus
from flowroll.errors import EngineError, RankLostError

_log = logging.getLogger(__name__)
ReplicaState: TypeAlias = Literal["starting", "ready", "draining", "lost"]
# What Ray raises of a call whose actor, node or result is gone.
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RaySystemError,
)
# Calls of one replica at a time. A fleet that lets in no more than its replicas' queues hold does not come near it.
_MAX_CALLS = 10_000
# More than this between the clocks of two nodes is the distance of their clocks, not of a call.
_SAME_CLOCK_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What one replica needs of the cluster. All of it lies on one node, since an engine starts its ranks on its own machine.

    Each replica has a placement group of its own with one bundle (STRICT_PACK), which holds what all its ranks need.

    Attributes:
        num_cpus: The number of CPUs.
        num_gpus: The number of GPUs: one for each rank of the layout, or 0.
        resources: Other resources of Ray's, by name.
    """

    num_cpus: float
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """The resources that a replica needs, by Ray's names; those of which it needs none are left out."""
        needed = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in needed.items() if amount}

    def num_places(self) -> int:
        """Returns how many replicas the living nodes of the cluster could hold, if nothing else ran there."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        bundle = self.bundle.items()
        return sum(min((int(node.get(name, 0) // amount) for name, amount in bundle), default=1) for node in nodes)


class ActorReplica:
    """A replica that runs as an actor of Ray's. One event loop owns it.

    Args:
        number: Its number, which no other replica of the fleet has or had.
        engine: The arguments of `EngineActor`.
        placement: What it needs of the cluster.

    Attributes:
        id: Its id, "replica-0" and so on.
        state: "starting", until it has the fleet's weights; "ready" to take requests; "draining"; "lost".
        facts: The facts about its engine; None while it starts.
        pid: The process id of the actor; None while it starts.
        node: The id of its node in Ray.
        started_s: When it was started, by the monotonic clock.
    """

    def __init__(self, number: int, engine: Mapping[str, Any], placement: Placement) -> None:
        self.id = f"replica-{number}"
        self.state: ReplicaState = "starting"
        self.facts: EngineFacts | None = None
        self.pid: int | None = None
        self.node = ""
        self.started_s = time.monotonic()
        self._numbers = itertools.count()
        self._place: PlacementGroup | None = None
        if placement.bundle:
            self._place = placement_group([placement.bundle], strategy="STRICT_PACK")
        kind = ray.remote(EngineActor).options(
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
            resources=dict(placement.resources) or None,
            scheduling_strategy="DEFAULT" if self._place is None else PlacementGroupSchedulingStrategy(self._place),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_MAX_CALLS,
        )
        self._actor = kind.remote(**engine)

    async def wait(self) -> EngineFacts:
        """Waits until the engine is up.

        Raises:
            FlowrollError: It cannot be started; this is the reason.
            ReplicaLostError: It has ended.
        """
        try:
            self.facts = await self._actor.facts.remote()
            self.pid = await self._actor.pid.remote()
            self.node = await self._actor.node.remote()
        except ray.exceptions.ActorDiedError as error:
            # Of an actor whose constructor failed Ray tells the error's text alone.
            raise EngineError(f"a replica must start, got {_last_line(error)}; see its log.") from None
        except LOST as error:
            raise self._lost(error) from None
        assert self.facts is not None
        return self.facts

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the engine's service, and returns its result or raises its error.

        Raises:
            ReplicaLostError: The replica has ended, or can run nothing more.
        """
        return (await self.ask(method, args, options)).result

    async def ask(self, method: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Outcome:
        """Calls a method of the engine's service, as `call` does, and returns all that is known of the call.

        A call that is cancelled is cancelled in the replica too.
        """
        number = next(self._numbers)
        try:
            sent = tuple(value if isinstance(value, ray.ObjectRef) else Parcel(value) for value in args)
            outcome: Outcome = await self._actor.call.remote(number, method, sent, dict(options))
        except asyncio.CancelledError:
            with contextlib.suppress(*LOST):
                self._actor.cancel.remote(number)
            raise
        except LOST as error:
            raise self._lost(error) from None
        except ray.exceptions.RayTaskError as error:
            _log.error("a call of %s failed", self.id, exc_info=error)
            raise EngineError(f"the replica must answer, got {_last_line(error)}; see its log.") from None
        if isinstance(outcome.error, RankLostError):
            raise self._lost(outcome.error)
        if outcome.error is not None:
            raise outcome.error
        return outcome

    async def status(self) -> EngineStatus:
        """Returns the state of the engine.

        Raises:
            ReplicaLostError: The replica has ended, or can run nothing more.
        """
        status = await self.call("status")
        assert isinstance(status, EngineStatus)
        return status

    def kill(self) -> None:
        """Ends the actor at once, and gives back its place. Its other ranks end with it."""
        self.state = "lost"
        with contextlib.suppress(Exception):
            ray.kill(self._actor, no_restart=True)
        if self._place is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._place)

    def _lost(self, error: BaseException) -> ReplicaLostError:
        return ReplicaLostError(f"{self.id}: {_last_line(error)}")


def local_spans(outcome: Outcome) -> tuple[StageSpan, ...]:
    """Returns the spans of a call by the clock of this process, which differs from that of another node."""
    shift_s = time.monotonic() - outcome.now_s
    if abs(shift_s) < _SAME_CLOCK_S:
        return outcome.spans
    return tuple(
        StageSpan(stage=span.stage, start_s=span.start_s + shift_s, end_s=span.end_s + shift_s) for span in outcome.spans
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
