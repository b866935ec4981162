"""How replicas join, leave and are watched: replicas that note what they are told, without Ray's processes."""

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import flowroll.serving
from flowroll.cluster import replicas
from flowroll.cluster.fleet import Fleet
from flowroll.cluster.groups import FleetGroups
from flowroll.cluster.replica import Placement
from flowroll.cluster.replicas import ReplicaSet
from flowroll.cluster.requests import FleetRequests
from flowroll.cluster.weights import FleetWeights
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError

WAIT_S = 20.0


@dataclass(frozen=True)
class Facts:
    """As much of an engine's facts as joining looks at."""

    modules: tuple[str, ...] = ("transformer",)
    batching: Any = field(default_factory=lambda: SimpleNamespace(max_batch_samples=4))
    info: Any = field(
        default_factory=lambda: SimpleNamespace(
            **dict.fromkeys(("family", "variant", "pipeline", "dtype", "parameters", "layout", "limits", "versions"), "one")
        )
    )
    pid: int = 1
    gpu_uuid: str | None = None


class Replica:
    """A replica that does what it is told, and notes it."""

    started_s, pid, node = 0.0, 1, "node"

    def __init__(self, number: int, engine: Any, placement: Any) -> None:
        self.id, self.state, self.facts = f"replica-{number}", "starting", Facts()
        self.told: list[tuple[Any, ...]] = []
        self.is_silent = False

    async def wait(self) -> Facts:
        return self.facts

    async def call(self, method: str, *args: Any, **options: Any) -> str:
        self.told.append((method, *args, *options.values()))
        return "the same of all"

    async def status(self) -> None:
        if self.is_silent:
            raise TimeoutError

    def kill(self) -> None:
        self.state = "lost"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[ReplicaSet], Awaitable[None]]], None]]:
    """Runs a check against two replicas that are up."""
    monkeypatch.setattr(replicas, "ActorReplica", Replica)
    monkeypatch.setattr(replicas, "_PULSE_S", 0.01)

    async def with_two(check: Callable[[ReplicaSet], Awaitable[None]]) -> None:
        two = ReplicaSet({}, num_replicas=2, placement=Placement(num_cpus=1), max_staleness=None, patience_s=0.1)
        await two.start()
        await check(two)

    yield lambda check: asyncio.run(asyncio.wait_for(with_two(check), WAIT_S))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def states(two: ReplicaSet) -> dict[str, str]:
    return {name: one.state for name, one in two.there.items()}


def told(two: ReplicaSet, name: str) -> list[tuple[Any, ...]]:
    found: Any = two.there[name]
    return found.told


def test_one_that_joins_is_asleep_paused_and_held_as_the_others_are_before_it_takes_requests(run: Any):
    async def check(two: ReplicaSet) -> None:
        two.memory_mode, two.paused, two.is_holding = "disk", ("keep", False), True
        two.lose(two.there["replica-0"], RuntimeError("it has ended"))
        await until(lambda: states(two) == {"replica-1": "ready", "replica-2": "ready"})
        assert told(two, "replica-2") == [("sleep", "disk"), ("pause", "keep", False), ("hold_starts", True)]
        assert {one.id for one in two.router.replicas} == {"replica-1", "replica-2"} and two.num_lost == 1

    run(check)


def test_one_that_leaves_ends_once_it_has_answered_and_is_paused_and_resumed_until_then(run: Any):
    async def check(two: ReplicaSet) -> None:
        parts = two.router.place(8, 8)
        resized = asyncio.create_task(two.resize(1))
        await until(lambda: "draining" in states(two).values())
        leaving = next(name for name, state in states(two).items() if state == "draining")
        await two.pause("keep", refuses=True)
        await two.on_running("resume")
        assert told(two, leaving)[-2:] == [("pause", "keep", True), ("resume",)]
        await two.on_all("checksums", ["transformer"])
        assert told(two, leaving)[-1] == ("resume",)
        await asyncio.sleep(0.2)
        assert states(two)[leaving] == "draining" and not resized.done()
        for part in parts:
            two.router.release(part)
        await resized
        assert list(states(two).values()) == ["ready"] and leaving not in two.there and two.num_lost == 0

    run(check)


def test_one_that_falls_silent_while_it_leaves_is_ended_and_not_replaced(run: Any):
    async def check(two: ReplicaSet) -> None:
        two.router.place(8, 8)
        resized = asyncio.create_task(two.resize(1))
        await until(lambda: "draining" in states(two).values())
        silent: Any = next(one for one in two.there.values() if one.state == "draining")
        silent.is_silent = True
        await resized
        assert silent.state == "lost" and list(states(two).values()) == ["ready"] and two.num_lost == 1

    run(check)


def test_a_fleet_does_not_discard_weights_which_replicas_that_join_later_need(run: Any):
    async def check(two: ReplicaSet) -> None:
        with pytest.raises(InvalidRequestError, match=r"mode must be offload or disk for a fleet, .* got discard") as refused:
            await FleetWeights(two, "rolling").sleep("discard")
        assert refused.value.field == "mode" and two.memory_mode is None
        assert "sleep" not in {method for name in states(two) for method, *_ in told(two, name)}

    run(check)


# They follow `open_sent`, which a fleet refuses.
AFTER_A_REFUSAL = {"close_sent", "fill_from_sent", "load_pushed_adapter"}
# `Fleet` has these itself.
OWN = {"cancel", "close", "facts", "failure"}
ROUTERS = Path(flowroll.serving.__file__).parent


def asked_for() -> set[str]:
    """The methods of an engine's service that HTTP asks for."""
    text = "".join(file.read_text() for file in ROUTERS.rglob("*.py"))
    return set(re.findall(r"EngineService\.([a-z_]+)", text)) - AFTER_A_REFUSAL - OWN


@pytest.mark.parametrize("name", sorted(asked_for()))
def test_a_fleet_takes_every_argument_that_an_engine_takes(name: str):
    there: Any = SimpleNamespace()
    fleet: Any = Fleet.__new__(Fleet)
    weights = FleetWeights(there, "rolling")
    fleet._requests, fleet._weights, fleet._groups = FleetRequests(there), weights, FleetGroups(there, weights)
    _, *wanted = inspect.signature(getattr(EngineService, name)).parameters.values()
    given = [one.name for one in wanted if one.kind is one.POSITIONAL_OR_KEYWORD]
    named = {one.name: None for one in wanted if one.kind is one.KEYWORD_ONLY}
    inspect.signature(fleet._method(name, [])).bind(*given, **named)
