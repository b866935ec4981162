"""Changes on all replicas or on none, with faults at every moment. None of this needs Ray."""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from flowroll.cluster.updates import MAX_CHANGES, MAX_HELD_SETS, Applied, Change, ChangeLog, ReplicaLostError, change_all
from flowroll.errors import FlowrollError, RankLostError, WeightsRejectedError

KINDS = ("stage", "exchange", "drop")


@dataclass
class Fake:
    """A replica that has one number for its weights, and ends or refuses where it is told."""

    id: str
    version: int = 0
    staged: int | None = None
    is_alive: bool = True
    faults: dict[str, str] = field(default_factory=dict)

    async def do(self, step: str, version: int) -> Any:
        await asyncio.sleep(0)
        if not self.is_alive:
            raise ReplicaLostError(self.id)
        fault = self.faults.get(step)
        if fault == "refuses":
            raise WeightsRejectedError(f"{self.id} must take it, got a fault.")
        if fault == "dies before":
            self.is_alive = False
            raise ReplicaLostError(self.id)
        if step == "stage":
            self.staged = version
        elif step == "exchange":
            assert self.staged == version
            self.version, self.staged = version, None
        else:
            self.staged = None
        if fault == "dies after":
            self.is_alive = False
            raise ReplicaLostError(self.id)
        return self.id


@dataclass
class Update:
    version: int

    async def stage(self, member: Any) -> None:
        await member.do("stage", self.version)

    async def exchange(self, member: Any) -> str:
        return await member.do("exchange", self.version)

    async def drop(self, member: Any) -> None:
        await member.do("drop", self.version)


def change(members: list[Fake]) -> Applied:
    return asyncio.run(change_all(Update(1), members))


def test_all_replicas_change():
    members = [Fake(name) for name in "abc"]
    applied = change(members)
    assert applied.unfit == () and set(applied.results) == set("abc")
    assert [member.version for member in members] == [1, 1, 1]


def test_a_replica_that_fails_to_stage_leaves_all_at_the_old_version():
    members = [Fake("a"), Fake("b", faults={"stage": "refuses"}), Fake("c")]
    with pytest.raises(WeightsRejectedError, match="b must"):
        change(members)
    assert [(member.version, member.staged) for member in members] == [(0, None)] * 3


@pytest.mark.parametrize("step", ["stage", "exchange"])
@pytest.mark.parametrize("fault", ["dies before", "dies after"])
def test_a_replica_that_dies_in_between_is_unfit_and_the_others_change(step: str, fault: str):
    members = [Fake("a"), Fake("b", faults={step: fault}), Fake("c")]
    assert change(members).unfit == ("b",)
    assert [member.version for member in members if member.is_alive] == [1, 1]


def test_a_replica_that_does_not_exchange_what_others_did_is_unfit():
    members = [Fake("a"), Fake("b", faults={"exchange": "refuses"})]
    assert change(members).unfit == ("b",)


def test_what_all_refuse_to_exchange_changes_nothing():
    members = [Fake(name, faults={"exchange": "refuses"}) for name in "ab"]
    with pytest.raises(WeightsRejectedError):
        change(members)
    assert [(member.version, member.staged) for member in members] == [(0, None)] * 2


def test_the_end_of_all_replicas_is_an_error():
    for step in ("stage", "exchange"):
        with pytest.raises(RankLostError):
            change([Fake(name, faults={step: "dies before"}) for name in "ab"])


def test_an_error_that_nobody_expects_comes_after_all_have_ended():
    class Odd(Fake):
        async def do(self, step: str, version: int) -> Any:
            raise ZeroDivisionError

    other = Fake("b")
    with pytest.raises(ZeroDivisionError):
        change([Odd("a"), other])
    assert other.staged == 1


def test_with_faults_at_random_no_fit_replica_has_another_version():
    drawn = random.Random(1)
    outcomes = {"changed": 0, "refused": 0}
    for _ in range(400):
        members = []
        for name in "abcd"[: drawn.randint(1, 4)]:
            faults = {step: drawn.choice(["refuses", "dies before", "dies after"]) for step in KINDS if drawn.random() < 0.25}
            members.append(Fake(name, faults=faults))
        try:
            applied = change(members)
        except FlowrollError:
            outcomes["refused"] += 1
            assert all(member.version == 0 for member in members if member.is_alive)
            continue
        outcomes["changed"] += 1
        fit = [member for member in members if member.id not in applied.unfit]
        assert fit and all(member.is_alive and member.version == 1 for member in fit)
    assert min(outcomes.values()) > 50


# The record of changes


def log_of(*changes: Change) -> ChangeLog:
    log = ChangeLog()
    for one in changes:
        log.add(one)
    return log


def weights(tag: int, module: str = "transformer", *, is_whole: bool = True) -> Change:
    return Change(kind="weights", name=module, is_whole=is_whole, steps=tag)


def test_whole_weights_replace_what_was_before_them():
    log = log_of(weights(1), weights(2, is_whole=False), weights(3, "vae"), weights(4), weights(5, is_whole=False))
    assert [one.steps for one in log.changes] == [3, 4, 5]


def test_an_adapter_is_kept_until_it_is_replaced_or_unloaded():
    one, other = Change(kind="adapter", name="one", steps=1), Change(kind="adapter", name="other", steps=2)
    assert [change.steps for change in log_of(one, other, weights(3), Change(kind="adapter", name="one", steps=4)).changes] == [
        2,
        3,
        4,
    ]
    assert log_of(one, Change(kind="unload", name="one")).changes == ()


def test_a_policy_keeps_what_it_was_made_of():
    made = [weights(1), Change(kind="policy", name="old", steps=2), weights(3)]
    assert [one.steps for one in log_of(*made).changes] == [1, 2, 3]
    assert [one.steps for one in log_of(*made, Change(kind="drop_policy", name="old")).changes] == [3]


def test_averages_of_many_sets_are_not_kept_and_the_log_comes_back():
    log = ChangeLog()
    for number in range(MAX_HELD_SETS + 1):
        log.add(weights(number))
        log.add(Change(kind="policy", name="ema"))
    assert not log.is_complete
    with pytest.raises(RankLostError, match="drop the policies"):
        _ = log.changes
    log.add(weights(100))
    assert not log.is_complete
    log.add(Change(kind="drop_policy", name="ema"))
    assert log.is_complete and [one.steps for one in log.changes] == [100]


def test_many_partial_changes_are_not_kept():
    log = ChangeLog()
    for number in range(MAX_CHANGES + 1):
        log.add(Change(kind="adapter", name=str(number)))
    assert not log.is_complete
    log.add(weights(1))
    assert not log.is_complete  # the adapters before are not known


def test_a_given_up_log_holds_nothing():
    log = ChangeLog()
    for number in range(MAX_HELD_SETS + 1):
        log.add(weights(number, is_whole=False))
    assert log._changes == [] and not log.is_complete
    log.add(weights(9))
    assert [one.steps for one in log.changes] == [9]
