"""The process groups of a fleet with trainers: every replica is a member, of a rank of its own."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowroll.cluster.changes import Bucket
from flowroll.cluster.replicas import ReplicaSet
from flowroll.cluster.updates import ReplicaLostError
from flowroll.cluster.weights import FleetWeights
from flowroll.engine.service import UpdateProgress
from flowroll.errors import InvalidRequestError, NotFoundError, WeightsRejectedError
from flowroll.wire.safetensors import TensorHead


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A group that all replicas have joined.

    Attributes:
        id: Its id; a later group of the same name has another one.
        ids: The id that each replica has for it, by the replica's id.
    """

    id: str
    ids: Mapping[str, str]


class FleetGroups:
    """The groups by their names. The methods have the names and arguments of those of `EngineService`.

    A replica cannot join a group that there is already: once one has joined the fleet, its trainer has to begin the group anew.

    Args:
        replicas: The members.
        weights: The updates that arrive through the groups.
    """

    def __init__(self, replicas: ReplicaSet, weights: FleetWeights) -> None:
        self._replicas, self._weights = replicas, weights
        self._groups: dict[str, _Group] = {}

    async def join_group(self, name: str, *, rank: int, world_size: int, **place: Any) -> None:
        """Has every replica join, with the ranks from `rank` on."""
        members = self._replicas.ready()
        if rank + len(members) > world_size:
            raise InvalidRequestError(
                f"world_size must have ranks for {len(members)} replicas from rank_offset {rank} on, got {world_size}; "
                "add what /get_world_size says to the ranks of the trainer.",
                field="world_size",
            )
        options = {"world_size": world_size, **place}
        joins = [one.call("join_group", name, rank=rank + number, **options) for number, one in enumerate(members)]
        found = await asyncio.gather(*joins, return_exceptions=True)
        if errors := [one for one in found if isinstance(one, BaseException)]:
            await self._on_members("leave_group", name)
            raise errors[0]
        ids = await asyncio.gather(*(one.call("find_group", name) for one in members))
        self._groups[name] = _Group(
            id=secrets.token_hex(8), ids={one.id: group_id for one, group_id in zip(members, ids, strict=True)}
        )

    async def find_group(self, name: str) -> str:
        """Returns the id of the group with this name."""
        return self._find(name).id

    async def fill_from_group(
        self, update_id: str, group_name: str, group_id: str, heads: Sequence[TensorHead], **options: Any
    ) -> UpdateProgress:
        """Has every replica receive a bucket; a copy of it is kept for replicas that join later."""
        group = self._find(group_name, group_id)
        async with self._replicas.changing:
            upload = self._weights.upload(update_id)
            if {one.id for one in self._replicas.ready()} != set(group.ids):
                raise WeightsRejectedError(
                    "the group must have all replicas as members, got a fleet whose replicas have changed since; destroy the "
                    "group and init it again."
                )
            fill = functools.partial(upload.fill, group=group_name, ids=group.ids, heads=heads, **options)
            progress = await self._weights.filled(upload, fill)
            heads, memory = await self._copy(upload.ids, [head.name for head in heads])
            upload.buckets.append(Bucket(heads, await self._weights.stored(memory)))
            return progress

    async def _copy(self, ids: Mapping[str, str], names: Sequence[str]) -> Any:
        """Returns what has arrived from one of the replicas that live."""
        for one in self._replicas.ready():
            try:
                return await one.call("arrived_bucket", ids[one.id], list(names))
            except ReplicaLostError as error:
                self._replicas.lose(one, error)
        raise ReplicaLostError("none is ready")

    async def fail_group(self, name: str, group_id: str) -> None:
        """Closes a group after one of its buckets was refused."""
        if (group := self._groups.get(name)) is not None and group.id == group_id:
            calls = [one.call("fail_group", name, group.ids[one.id]) for one in self._replicas.ready() if one.id in group.ids]
            await asyncio.gather(*calls, return_exceptions=True)

    async def leave_group(self, name: str) -> None:
        """Has every replica leave a group."""
        self._find(name)
        del self._groups[name]
        await self._on_members("leave_group", name)

    async def leave_groups(self) -> None:
        """Has every replica leave all groups."""
        self._groups.clear()
        await self._on_members("leave_groups")

    async def _on_members(self, method: str, *args: Any) -> None:
        # A replica that is gone, or has not joined, has nothing to leave.
        await asyncio.gather(*(one.call(method, *args) for one in self._replicas.ready()), return_exceptions=True)

    def _find(self, name: str, group_id: str | None = None) -> _Group:
        group = self._groups.get(name)
        if group is None or group_id not in (None, group.id):
            raise NotFoundError(f"group_name must be of a group, got {name[:80]}; init it first.", field="group_name")
        return group
