"""Weights on all replicas or on none, and the record by which a replica that replaces another one gets them.

A change (new weights, an adapter, a policy) is staged on every replica, which may be refused, and then exchanged on every
replica. This module knows nothing of Ray, and does no input or output of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from flowroll.errors import FlowrollError, RankLostError

ChangeKind = Literal["weights", "adapter", "unload", "policy", "drop_policy"]
# Beyond these bounds the record is given up: what it holds is memory of the cluster.
MAX_CHANGES = 256
MAX_HELD_SETS = 4


class ReplicaLostError(Exception):
    """The replica has ended; whatever it was asked has no answer."""


class Member(Protocol):
    """A replica, as a change sees it. Any method may raise `ReplicaLostError`."""

    id: str


class Steps(Protocol):
    """What a change does on each replica."""

    async def stage(self, member: Any) -> None:
        """Gets the change ready on a replica, where nothing changes yet. A `FlowrollError` refuses the change."""

    async def exchange(self, member: Any) -> Any:
        """Puts the change in place; a replica that raises a `FlowrollError` has not changed."""

    async def drop(self, member: Any) -> None:
        """Forgets what was staged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A change that is in place.

    Attributes:
        results: What each replica that has changed says, by its id.
        unfit: The replicas that have not changed, and must not run a request any more: they are to be replaced.
    """

    results: Mapping[str, Any]
    unfit: tuple[str, ...]


async def change_all(steps: Steps, members: Sequence[Member]) -> Applied:
    """Makes a change on all replicas, or on none.

    It is decided once all replicas that are left have staged it. From then on a replica that does not exchange is unfit.

    Args:
        steps: What the change does on each replica.
        members: The replicas.

    Raises:
        FlowrollError: A replica refused to stage it, or all of them refused to exchange it. All have the version before.
        RankLostError: Every replica has ended.
    """
    staged = await _on_each(steps.stage, members)
    ready = [member for member in members if staged[member.id] is None]
    if refusals := [error for error in staged.values() if isinstance(error, FlowrollError)]:
        await _on_each(steps.drop, ready)
        raise refusals[0]
    if not ready:
        raise _all_lost()
    exchanged = await _on_each(steps.exchange, ready)
    results = {name: result for name, result in exchanged.items() if not isinstance(result, Exception)}
    if not results:
        refused = {name: error for name, error in exchanged.items() if isinstance(error, FlowrollError)}
        await _on_each(steps.drop, [member for member in ready if member.id in refused])
        raise next(iter(refused.values()), _all_lost())
    return Applied(results=results, unfit=tuple(member.id for member in members if member.id not in results))


async def _on_each(action: Callable[[Member], Awaitable[Any]], members: Sequence[Member]) -> dict[str, Any]:
    """Returns the result, the `FlowrollError` or the `ReplicaLostError` of each; any other error is raised, after all ended."""
    found = await asyncio.gather(*(action(member) for member in members), return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, FlowrollError | ReplicaLostError):
            raise one
    return {member.id: one for member, one in zip(members, found, strict=True)}


def _all_lost() -> RankLostError:
    return RankLostError("a replica must live to be changed, got the end of all of them; look at their logs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change that was made, as it can be made again.

    Attributes:
        kind: What it changed.
        name: The module, the adapter or the policy.
        is_whole: Of weights, whether they were all of the module's, so that nothing before them is left.
        steps: Makes the change on a replica.
    """

    kind: ChangeKind
    name: str
    is_whole: bool = True
    steps: Any = None


class ChangeLog:
    """The changes that make of the checkpoint what the replicas have now, without those that left no trace.

    It is bounded: policies that are averages need all weights that went into them, and a log that would hold more than
    `MAX_HELD_SETS` sets of weights, or `MAX_CHANGES` changes, is given up. Then a replica that is lost cannot be replaced,
    until the policies are dropped and whole weights have come.
    """

    def __init__(self) -> None:
        self._changes: list[Change] = []
        # What differs from the checkpoint, whether or not it is known how.
        self._differing: dict[str, set[str]] = {"weights": set(), "adapter": set(), "policy": set()}
        self.is_complete = True

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes, in their order.

        Raises:
            RankLostError: They are not known any more.
        """
        if not self.is_complete:
            raise RankLostError(
                "a replica must be given the fleet's weights and policies to join, got more changes than are kept; drop the "
                "policies and send whole weights."
            )
        return tuple(self._changes)

    def add(self, change: Change) -> None:
        """Notes a change that was made."""
        self._note(change)
        self._changes = _without_traces([*self._changes, change])
        if not self.is_complete:
            self.is_complete = self._covers_all()
        num_sets = sum(one.kind == "weights" for one in self._changes)
        if len(self._changes) > MAX_CHANGES or num_sets > max(MAX_HELD_SETS, len(self._differing["weights"])):
            self._changes, self.is_complete = [], False

    def _note(self, change: Change) -> None:
        if change.kind == "unload":
            self._differing["adapter"].discard(change.name)
        elif change.kind == "drop_policy":
            self._differing["policy"].discard(change.name)
        else:
            self._differing[change.kind].add(change.name)

    def _covers_all(self) -> bool:
        """Tells whether a log that was given up and goes on has everything again."""
        found = {(one.kind, one.name) for one in self._changes if one.is_whole}
        needed = {(kind, name) for kind in ("weights", "adapter") for name in self._differing[kind]}
        return not self._differing["policy"] and needed <= found


def _without_traces(changes: list[Change]) -> list[Change]:
    """Leaves out what has no effect any more."""
    last = changes[-1]
    if last.kind == "drop_policy":
        changes = [one for one in changes if not (one.kind in ("policy", "drop_policy") and one.name == last.name)]
    if any(one.kind == "policy" for one in changes):
        # A policy was made of what was in place then.
        return changes
    return [
        one
        for place, one in enumerate(changes)
        if one.kind != "unload" and not any(_undoes(later, one) for later in changes[place + 1 :])
    ]


def _undoes(later: Change, earlier: Change) -> bool:
    """Tells whether nothing of an earlier change is left after a later one."""
    if earlier.name != later.name:
        return False
    if earlier.kind == "weights":
        return later.kind == "weights" and later.is_whole
    return earlier.kind == "adapter" and later.kind in ("adapter", "unload")
