"""The process groups that an engine is in, and tensors from one of them into an update.

Rank 0 of the engine receives all tensors; the other ranks get their parts at the commit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.errors import NotFoundError, WeightsBusyError
from flowroll.parallel.broadcasting import BroadcastGroup
from flowroll.wire.safetensors import TensorHead

UNRECEIVED = "a bucket that was refused"
# Each holds threads and connections, also of a trainer that was killed without a word.
MAX_GROUPS = 16


class WeightGroups:
    """The process groups of one engine, by name. Threads may share it."""

    def __init__(self) -> None:
        self._groups: dict[str, BroadcastGroup] = {}
        # A join holds a thread for as long as its trainer does not come.
        self._joining = threading.Lock()

    def find(self, name: str, group_id: str | None = None) -> BroadcastGroup:
        """The group of this name.

        Args:
            name: Of the group.
            group_id: Its id, where one that was made later is not meant; None: whichever it is.

        Raises:
            NotFoundError: There is none.
        """
        group = self._groups.get(name)
        if group is None or group_id not in (None, group.id):
            raise NotFoundError(f"group_name must be of a group, got {name[:80]}; init it first.", field="group_name")
        return group

    def join(self, name: str, make: Callable[[], BroadcastGroup]) -> None:
        """Joins a group; one of the same name is closed first, and those that have failed are forgotten.

        Raises:
            WeightsBusyError: There are too many.
            InvalidRequestError: The others do not come.
        """
        with self._joining:
            if (former := self._groups.pop(name, None)) is not None:
                former.close()
            self._groups = {other: group for other, group in self._groups.items() if not group.has_failed}
            if len(self._groups) >= MAX_GROUPS:
                self._forget_lost()
            if len(self._groups) >= MAX_GROUPS:
                raise WeightsBusyError(
                    f"the server must be in at most {MAX_GROUPS} process groups, got one more than {', '.join(self._groups)}; "
                    "destroy one of them first."
                )
            self._groups[name] = make()

    def leave(self, name: str) -> None:
        """Leaves a group.

        Raises:
            NotFoundError: There is none of this name.
        """
        group = self.find(name)
        self._groups.pop(name, None)
        group.close()

    def close(self) -> None:
        """Leaves all groups."""
        while self._groups:
            self._groups.popitem()[1].close()

    def _forget_lost(self) -> None:
        """Closes those whose trainer is gone."""
        for name, group in list(self._groups.items()):
            if group.has_lost_rank_0():
                group.close()
                self._groups.pop(name, None)


def receive_from_group(
    incoming: WeightReceiver, group: BroadcastGroup, heads: Sequence[TensorHead], *, flattened: bool = False
) -> None:
    """Receives a bucket; requests may run meanwhile.

    Args:
        incoming: What it is part of.
        group: Whose rank 0 sends it.
        heads: Its tensors, in the order in which they are sent.
        flattened: Whether they are sent as one, all bytes in a row.

    Raises:
        WeightsRejectedError: They are not wanted, which is found before any is received; or the sender is gone. Nothing is
            left of the bucket, and the group is closed: what was sent and not received would be taken for the next bucket.
    """
    try:
        with group.turn(), incoming.bucket(heads, device=group.device) as targets:
            _receive(group, targets, flattened)
    except BaseException:
        group.close(UNRECEIVED)
        raise


def _receive(group: BroadcastGroup, targets: Sequence[Tensor], flattened: bool) -> None:
    if not flattened:
        for target in targets:
            group.broadcast(target)
        return
    flat = torch.empty(sum(target.nbytes for target in targets), dtype=torch.uint8, device=group.device)
    group.broadcast(flat)
    parts = torch.split(flat, [target.nbytes for target in targets])
    for target, part in zip(targets, parts, strict=True):
        target.reshape(-1).view(torch.uint8).copy_(part)
