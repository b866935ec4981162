"""How a fleet runs requests: over replicas that answer as each test says, without Ray's processes."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.factories import make_rollout

from flowroll.cluster.routing import Router
from flowroll.cluster.updates import ReplicaLostError
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    FlowrollError,
    InvalidRequestError,
    OutdatedWeightsError,
    QueueFullError,
    RankLostError,
)

pytest.importorskip("ray")

from flowroll.cluster.replica import Outcome
from flowroll.cluster.requests import FleetRequests

WAIT_S = 20.0
Answer = Callable[["Plan"], Awaitable[list[Any]]]


class Plan:
    """A request of so many samples, each of one step."""

    def __init__(self, samples: range, **params: Any) -> None:
        self.samples, self.request_id = samples, "mine"
        self.num_steps_taken = self.num_answers = len(samples)
        self.params = SimpleNamespace(**{"min_weight_version": None, "max_staleness": None, "policy": None, **params})

    def part(self, samples: range) -> "Plan":
        return Plan(self.samples[samples.start : samples.stop], **vars(self.params))


class Replica:
    """A replica that answers as it is told, one answer after the other; the last one goes on."""

    def __init__(self, name: str, *answers: Answer) -> None:
        self.id, self._answers, self.asked, self.aborted = name, list(answers), [], asyncio.Event()

    async def ask(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Outcome:
        self.asked.append(args[0].samples)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return Outcome(result=await answer(args[0]), error=None, spans=(), now_s=0.0)

    async def call(self, method: str, *args: Any, **options: Any) -> int:
        assert (method, options) == ("abort", {"keep_partial": True})
        self.aborted.set()
        return 1


def made(version: str = "0") -> Answer:
    async def answer(plan: Plan) -> list[Any]:
        return [make_rollout(seed=seed, weight_version=version, left_out=()) for seed in plan.samples]

    return answer


def raising(error: BaseException) -> Answer:
    async def answer(plan: Plan) -> list[Any]:
        raise error

    return answer


def fleet_of(*replicas: Replica, batch: int = 4) -> tuple[FleetRequests, Any]:
    versions = WeightVersions()
    router = Router(versions, max_batch_samples=batch)
    there = {one.id: one for one in replicas}
    for one in replicas:
        router.join(one.id, version="0", number=0)

    def lose(replica: Replica, error: BaseException) -> None:
        there.pop(replica.id, None)
        router.leave(replica.id)

    held = SimpleNamespace(
        router=router, versions=versions, there=there, lose=lose, changing=asyncio.Lock(), running=lambda: list(there.values())
    )
    return FleetRequests(held), held


def run(fleet: FleetRequests, samples: int, *, timeout_s: float | None = None, **params: Any) -> list[Any]:
    plan: Any = Plan(range(samples), **params)
    return asyncio.run(asyncio.wait_for(fleet.submit(plan, "rollout", timeout_s=timeout_s, spans=[]), WAIT_S))


def outcomes(fleet: FleetRequests) -> tuple[int, int, int]:
    return fleet.samples.completed, fleet.samples.failed, fleet.samples.under_way


def check_released(held: Any) -> None:
    assert all(one.image_steps == one.num_requests == 0 for one in held.router.replicas)


def test_a_split_answer_is_in_the_order_of_its_samples():
    fleet, held = fleet_of(Replica("a", made()), Replica("b", made()))
    assert [one.seed for one in run(fleet, 7)] == list(range(7))
    assert fleet.num_split == 1 and outcomes(fleet) == (1, 0, 0)
    check_released(held)


def test_parts_of_older_weights_are_made_again():
    one, two = Replica("a", made("0"), made("1")), Replica("b", made("1"))
    fleet, held = fleet_of(one, two)
    held.versions.advance("1")
    for name in ("a", "b"):
        held.router.set_version(name, "1", 1)
    found = run(fleet, 7)
    assert [one.seed for one in found] == list(range(7)) and {one.weight_version for one in found} == {"1"}
    check_released(held)


def test_one_replica_makes_all_if_weights_change_once_more():
    fleet, held = fleet_of(Replica("a", made("0"), made("2")), Replica("b", made("1"), made("2")))
    for number, version in enumerate(("1", "2"), start=1):
        held.versions.advance(version)
        for name in ("a", "b"):
            held.router.set_version(name, version, number)
    found = run(fleet, 7)
    assert [one.seed for one in found] == list(range(7)) and {one.weight_version for one in found} == {"2"}


def test_what_a_lost_replica_ran_is_run_elsewhere_with_the_same_seeds():
    fleet, held = fleet_of(Replica("a", raising(ReplicaLostError("gone"))), Replica("b", made()))
    assert [one.seed for one in run(fleet, 3)] == [0, 1, 2]
    assert fleet.num_retried == 1 and list(held.there) == ["b"]


def test_a_request_that_ends_one_replica_after_the_other_ends():
    fleet, held = fleet_of(*(Replica(name, raising(ReplicaLostError("gone"))) for name in "abcde"))
    with pytest.raises(RankLostError):
        run(fleet, 3)
    assert len(held.there) == 2 and outcomes(fleet) == (0, 1, 0)


def test_full_replicas_are_asked_once_each_and_the_soonest_retry_counts():
    full = [QueueFullError("full", retry_after_s=seconds) for seconds in (9.0, 2.0, 5.0)]
    replicas = [Replica(name, raising(error)) for name, error in zip("abc", full, strict=True)]
    fleet, held = fleet_of(*replicas)
    with pytest.raises(QueueFullError) as raised:
        run(fleet, 3)
    assert raised.value.retry_after_s == 2.0 and [len(one.asked) for one in replicas] == [1, 1, 1]
    assert fleet.failures == {"queue_full": 1}
    check_released(held)


def test_samples_that_grew_too_old_are_made_elsewhere_or_not_at_all():
    stale = OutdatedWeightsError("old", field="max_staleness")
    fleet, _ = fleet_of(Replica("a", raising(stale)), Replica("b", made("1")))
    assert {one.weight_version for one in run(fleet, 3, max_staleness=0)} == {"1"}
    fleet, _ = fleet_of(Replica("a", raising(stale)), Replica("b", raising(stale)))
    with pytest.raises(OutdatedWeightsError):
        run(fleet, 3, max_staleness=0)


def test_an_error_of_a_part_ends_the_others():
    ended: list[bool] = []

    async def endless(plan: Plan) -> list[Any]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)
        raise AssertionError

    fleet, held = fleet_of(Replica("a", raising(InvalidRequestError("no", field="x"))), Replica("b", endless))
    with pytest.raises(InvalidRequestError):
        run(fleet, 7)
    assert ended == [True]
    check_released(held)


def test_a_deadline_counts_over_all_attempts():
    async def slow(plan: Plan) -> list[Any]:
        await asyncio.sleep(0.05)
        raise ReplicaLostError("gone")

    fleet, _ = fleet_of(Replica("a", slow), Replica("b", made()))
    with pytest.raises(DeadlineExceededError):
        run(fleet, 1, timeout_s=0.01)


def cut(fleet: FleetRequests, samples: int, ready: Callable[[], bool], **options: Any) -> tuple[int, list[Any] | FlowrollError]:
    """Aborts a request once something is so; returns the number of aborted requests, and how it ended."""

    async def both() -> tuple[int, list[Any] | FlowrollError]:
        plan: Any = Plan(range(samples))
        task = asyncio.ensure_future(fleet.submit(plan, "rollout", spans=[]))
        while not ready():
            await asyncio.sleep(0.001)
        count = await fleet.abort("mine", **options)
        try:
            return count, await task
        except FlowrollError as error:
            return count, error

    return asyncio.run(asyncio.wait_for(both(), WAIT_S))


def until_aborted(replica: list[Replica], *kept: int) -> Answer:
    """Runs until it is aborted, and then has these places of its samples."""

    async def answer(plan: Plan) -> list[Any]:
        await replica[0].aborted.wait()
        if not kept:
            raise CancelledRequestError("aborted")
        left = tuple(place for place in range(len(plan.samples)) if place not in kept)
        return [make_rollout(seed=plan.samples[place], weight_version="0", left_out=left) for place in kept]

    return answer


@pytest.mark.parametrize(
    ("kept", "seeds"), [((0, 2), [0, 2, 3, 4, 5, 6]), ((), [3, 4, 5, 6])], ids=["some of a part", "none of a part"]
)
def test_finished_samples_of_all_parts_are_kept(kept: tuple[int, ...], seeds: list[int]):
    slow: list[Replica] = []
    slow.append(Replica("a", until_aborted(slow, *kept)))
    other = Replica("b", made())
    fleet, held = fleet_of(slow[0], other)
    count, found = cut(fleet, 7, lambda: bool(other.asked), keep_partial=True)
    assert isinstance(found, list) and count == 1
    assert [one.seed for one in found] == seeds
    assert {one.left_out for one in found} == {tuple(set(range(7)) - set(seeds))}
    assert outcomes(fleet) == (1, 0, 0)
    check_released(held)


def test_without_a_finished_sample_it_is_cancelled():
    slow: list[Replica] = []
    slow.append(Replica("a", until_aborted(slow)))
    fleet, _ = fleet_of(slow[0])
    count, ended = cut(fleet, 3, lambda: bool(slow[0].asked), keep_partial=True)
    assert count == 1 and isinstance(ended, CancelledRequestError)
    assert outcomes(fleet) == (0, 1, 0)


def test_what_is_cut_while_its_replica_ends_is_not_run_again():
    async def lost(plan: Plan) -> list[Any]:
        await one.aborted.wait()
        raise ReplicaLostError("gone")

    one, other = Replica("a", lost), Replica("b", made())
    fleet, _ = fleet_of(one, other)
    _, ended = cut(fleet, 3, lambda: bool(one.asked), keep_partial=True)
    assert isinstance(ended, CancelledRequestError) and other.asked == []


def test_an_abort_of_another_id_changes_nothing():
    async def later(plan: Plan) -> list[Any]:
        await asyncio.sleep(0.02)
        return await made()(plan)

    one = Replica("a", later)
    fleet, _ = fleet_of(one)

    async def both() -> tuple[int, int, int]:
        plan: Any = Plan(range(2))
        task = asyncio.ensure_future(fleet.submit(plan, "rollout", spans=[]))
        await asyncio.sleep(0.005)
        none = await fleet.abort("other") + await fleet.abort("other", keep_partial=True)
        return none, len(await task), await fleet.abort(None)

    assert asyncio.run(both()) == (0, 2, 0)
