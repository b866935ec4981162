"""The process groups that this server is in. Everything here is called on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
from starlette.concurrency import run_in_threadpool

from flowroll.errors import NotFoundError, WeightsBusyError
from flowroll.parallel.broadcasting import BroadcastGroup

# Each holds threads and connections, also of a trainer that was killed without a word.
MAX_GROUPS = 16


class WeightGroups:
    """See the module."""

    def __init__(self) -> None:
        self._groups: dict[str, BroadcastGroup] = {}
        # Each holds a thread for as long as its trainer does not come.
        self._joining = asyncio.Lock()

    def find(self, name: str) -> BroadcastGroup:
        """The group of this name.

        Raises:
            NotFoundError: There is none.
        """
        if name not in self._groups:
            raise NotFoundError(f"group_name must be of a group, got {name[:80]}; init it first.", field="group_name")
        return self._groups[name]

    async def join(self, name: str, make: Callable[[], BroadcastGroup]) -> None:
        """Joins a group; one of the same name is closed first, and those that have failed are forgotten.

        Raises:
            WeightsBusyError: There are too many.
            InvalidRequestError: The others do not come.
        """
        async with self._joining:
            if (former := self._groups.pop(name, None)) is not None:
                await close_group(former)
            self._forget([other for other, group in self._groups.items() if group.has_failed])
            if len(self._groups) >= MAX_GROUPS:
                await self._forget_lost()
            if len(self._groups) >= MAX_GROUPS:
                raise WeightsBusyError(
                    f"the server must be in at most {MAX_GROUPS} process groups, got one more than {', '.join(self._groups)}; "
                    "destroy one of them first."
                )
            self._groups[name] = await run_in_threadpool(make)

    async def destroy(self, name: str) -> None:
        """Leaves a group.

        Raises:
            NotFoundError: There is none of this name.
        """
        group = self.find(name)
        del self._groups[name]
        await close_group(group)

    async def close(self) -> None:
        """Leaves all."""
        while self._groups:
            await close_group(self._groups.popitem()[1])

    async def _forget_lost(self) -> None:
        """Closes those whose trainer is gone."""
        for name, group in list(self._groups.items()):
            if await run_in_threadpool(group.has_lost_rank_0):
                await close_group(group)
                self._forget([name])

    def _forget(self, names: list[str]) -> None:
        for name in names:
            self._groups.pop(name, None)


async def close_group(group: BroadcastGroup, reason: str = "its end") -> None:
    """Closes a group on a thread, since NCCL takes seconds for it; whoever is cancelled meanwhile, it is closed."""
    with anyio.CancelScope(shield=True):
        await run_in_threadpool(group.close, reason)
