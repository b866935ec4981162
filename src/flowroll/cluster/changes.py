"""The changes of a fleet's weights, adapters and policies, each as what is called on a replica to stage and to exchange it.

Each can be made again on a replica that joins later. What is large is given as whatever `store` of the fleet made of it: one
reference for all replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowroll.cluster.updates import Member
from flowroll.engine.scheduler import ExclusiveMode
from flowroll.engine.service import OpenedUpdate
from flowroll.wire.safetensors import TensorHead


class Replica(Member, Protocol):
    """A replica whose engine's service can be called."""

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of `EngineService`, and returns its result or raises its error."""


class Change:
    """A change of weights or adapters, with the version that they have afterwards.

    Args:
        mode: What happens to running requests.
        method: The method of `EngineService` that stages it.
        *args: Its arguments.
        **options: Its keyword arguments.

    Attributes:
        version: The name of the version; the fleet sets it before the change is made.
        mode: What happens to running requests.
    """

    version: str
    mode: ExclusiveMode

    def __init__(self, mode: ExclusiveMode, method: str, /, *args: Any, **options: Any) -> None:
        self.mode = mode
        self._method, self._args, self._options = method, args, options
        self._staged: dict[str, str] = {}

    async def stage(self, member: Replica) -> None:
        """Gets the change ready on a replica."""
        self._staged[member.id] = await self._stage(member)

    async def exchange(self, member: Replica) -> Any:
        """Puts the change in place on a replica."""
        return await member.call("commit_staged", self._staged.pop(member.id), self.version, self.mode)

    async def drop(self, member: Replica) -> None:
        """Forgets what was staged on a replica."""
        if (staged := self._staged.pop(member.id, None)) is not None:
            await member.call("drop_staged", staged)

    async def _stage(self, member: Replica) -> str:
        return str(await member.call(self._method, *self._args, **self._options))


class AtOnce(Change):
    """A change with nothing to stage, which a method makes: the end of an adapter, or what becomes of a policy.

    Args:
        mode: What happens to running requests.
        method: The method of `EngineService` that makes it.
        *args: Its arguments.
        is_versioned: Whether weights have another version afterwards.
        **options: Its keyword arguments.
    """

    def __init__(self, mode: ExclusiveMode, method: str, /, *args: Any, is_versioned: bool = False, **options: Any) -> None:
        super().__init__(mode, method, *args, mode=mode, **options)
        self._is_versioned = is_versioned

    async def stage(self, member: Replica) -> None:
        """There is nothing to stage."""

    async def exchange(self, member: Replica) -> Any:
        """Makes the change."""
        version = {"weight_version": self.version} if self._is_versioned else {}
        return await member.call(self._method, *self._args, **version, **self._options)


@dataclass(slots=True)
class Bucket:
    """A bucket of an upload.

    Attributes:
        heads: The names, dtypes and shapes of its tensors.
        stored: The memory with its tensors, as the fleet has stored it; None: it has not come yet.
    """

    heads: Sequence[TensorHead]
    stored: Any = None


class Upload(Change):
    """New weights that arrive in buckets, each stored once for all replicas.

    Args:
        module: The module that they are for.
        partial: Whether tensors that do not come stay as they are.

    Attributes:
        opened: The update, as one of the replicas has opened it.
        buckets: The buckets that were claimed.
        ids: The id that the update has on each replica that takes more of its tensors.
    """

    def __init__(self, module: str, *, partial: bool) -> None:
        super().__init__("drain", "stage_update")
        self.module, self.partial = module, partial
        self.opened: OpenedUpdate | None = None
        self.buckets: list[Bucket] = []
        self.ids: dict[str, str] = {}

    @property
    def is_whole(self) -> bool:
        """Whether it has all tensors of the module, so that nothing before it is left."""
        arrived = {head.name for bucket in self.buckets if bucket.stored is not None for head in bucket.heads}
        return self.opened is not None and arrived == set(self.opened.names)

    async def open(self, member: Replica) -> OpenedUpdate:
        """Opens the update on a replica, and gives it the buckets that have come."""
        opened = await member.call("open_update", self.module, partial=self.partial)
        assert isinstance(opened, OpenedUpdate)
        self.ids[member.id] = opened.update_id
        for bucket in self.buckets:
            await self.claim(member, bucket)
            if bucket.stored is not None:
                await self.put(member, bucket)
        return opened

    async def claim(self, member: Replica, bucket: Bucket) -> None:
        """Has a replica check what a bucket will hold."""
        await member.call("claim_bucket", self.ids[member.id], bucket.heads)

    async def put(self, member: Replica, bucket: Bucket) -> Any:
        """Gives a replica a bucket that it has checked."""
        return await member.call("put_bucket", self.ids[member.id], bucket.heads, bucket.stored)

    async def fill(
        self, member: Replica, group: str, ids: Mapping[str, str], heads: Sequence[TensorHead], **options: Any
    ) -> Any:
        """Has a replica receive a bucket from a process group, which it knows by an id of its own."""
        return await member.call("fill_from_group", self.ids[member.id], group, ids[member.id], heads, **options)

    async def drop_bucket(self, member: Replica, bucket: Bucket) -> None:
        """Takes back what `claim` did."""
        await member.call("drop_bucket", self.ids[member.id], bucket.heads)

    def is_open_on(self, replica: str) -> bool:
        """Tells whether a replica takes more of its tensors."""
        return replica in self.ids

    async def abandon(self, member: Replica) -> None:
        """Ends the update on a replica; its weights stay."""
        if (update_id := self.ids.pop(member.id, None)) is not None:
            await member.call("drop_update", update_id)

    async def _stage(self, member: Replica) -> str:
        if member.id not in self.ids:
            await self.open(member)
        staged = str(await member.call("stage_update", self.ids[member.id]))
        del self.ids[member.id]
        return staged
