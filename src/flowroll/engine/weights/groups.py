"""The process groups that an engine has joined, and the receiving of tensors from one of them into an update.

Only rank 0 of the engine receives the tensors; the other ranks get their parts at the commit.
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
# Each group holds threads and connections, even after its trainer was killed.
MAX_GROUPS = 16


class WeightGroups:
    """The process groups of one engine, by name. Several threads may use it at the same time."""

    def __init__(self) -> None:
        self._groups: dict[str, BroadcastGroup] = {}
        # Serializes joins; a join blocks its thread until the trainer joins too.
        self._joining = threading.Lock()

    def find(self, name: str, group_id: str | None = None) -> BroadcastGroup:
        """Returns the group of this name.

        Args:
            name: Of the group.
            group_id: Its id, where one that was made later is not meant; None: whichever it is.

        Raises:
            NotFoundError: There is no such group.
        """
        group = self._groups.get(name)
        if group is None or group_id not in (None, group.id):
            raise NotFoundError(f"group_name must be of a group, got {name[:80]}; init it first.", field="group_name")
        return group

    def join(self, name: str, make: Callable[[], BroadcastGroup]) -> None:
        """Joins a group. A group of the same name is closed first, and groups that have failed are removed.

        Args:
            name: The name of the group.
            make: Joins the group and returns it.

        Raises:
            WeightsBusyError: The engine is in too many groups.
            InvalidRequestError: The other members do not join.
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
            NotFoundError: There is no group with this name.
        """
        group = self.find(name)
        self._groups.pop(name, None)
        group.close()

    def close(self) -> None:
        """Leaves all groups."""
        while self._groups:
            self._groups.popitem()[1].close()

    def _forget_lost(self) -> None:
        """Closes and removes the groups whose trainer has ended."""
        for name, group in list(self._groups.items()):
            if group.has_lost_rank_0():
                group.close()
                self._groups.pop(name, None)


def receive_from_group(
    incoming: WeightReceiver, group: BroadcastGroup, heads: Sequence[TensorHead], *, flattened: bool = False
) -> None:
    """Receives a bucket of tensors from a process group. Requests may run meanwhile.

    Args:
        incoming: The receiver of the update that the bucket belongs to.
        group: The group, whose rank 0 sends the bucket.
        heads: The names, dtypes and shapes of its tensors, in the order in which they are sent.
        flattened: Whether all tensors are sent as one tensor of uint8 that holds their bytes in a row.

    Raises:
        WeightsRejectedError: The update refuses the tensors, which is found before any is received, or the sender has ended.
            The bucket is dropped and the group is closed, since data that was not received would be taken for the next bucket.
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
