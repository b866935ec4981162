"""The process groups that an engine has joined, and the receiving of tensors from one of them into an update.

Only rank 0 of the engine receives the tensors; the other ranks get their parts at the commit.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import listed, rejected
from flowroll.errors import NotFoundError, WeightsBusyError, WeightsRejectedError
from flowroll.families.checksums import tensors_digest
from flowroll.parallel.broadcasting import BroadcastGroup, broken, unmet
from flowroll.parallel.group_process import UNWRITTEN, GroupProcess
from flowroll.parallel.shared_memory import placed
from flowroll.wire.safetensors import TensorHead

UNRECEIVED = "a bucket that was refused"
_REPLACED = "another of its name"
# How much longer than its timeout a join may take, in seconds.
_PATIENCE_S = 5.0


class GlooMembership(GroupProcess):
    """A membership in a group that sends tensors on the CPU."""

    def receive_into(self, targets: Sequence[Tensor], flattened: bool) -> None:
        """Fills contiguous tensors, the caller holding the `turn`; bytes that were not sent are `UNWRITTEN`.

        Args:
            targets: The tensors, in the order in which they are sent.
            flattened: Whether they are sent as one tensor of uint8 that holds their bytes in a row.

        Raises:
            WeightsRejectedError: They did not come, or there is not enough memory.
        """
        sizes = [target.nbytes for target in targets]
        try:
            memory = self.receive([sum(sizes)] if flattened else sizes).bytes
        except OSError as error:
            raise rejected(error, None) from error
        parts = torch.split(memory[: sum(sizes)], sizes) if flattened else ()
        starts = placed(sizes)[0]
        for index, (target, size) in enumerate(zip(targets, sizes, strict=True)):
            part = parts[index] if flattened else memory[starts[index] : starts[index] + size]
            _bytes_of(target).copy_(part)


class NcclMembership:
    """A membership in a group that sends tensors on GPUs.

    It lives in the engine's process: NCCL does not end the process when sizes differ, and another process would need a context
    of its own on the GPU, and handles to pass memory on. A join that does not end leaves its thread behind.

    Args:
        name: The group's name.
        device: The GPU on which tensors arrive.
        timeout_s: How many seconds to wait for the other members.
        place: The other arguments of `BroadcastGroup`.
    """

    def __init__(self, name: str, *, device: str, timeout_s: float, **place: Any) -> None:
        self.name, self.id, self.device = name, secrets.token_hex(8), torch.device(device)
        self.is_joined = False
        self._timeout_s, self._place = timeout_s, place
        self._failure: str | None = None
        self._joining: Future[BroadcastGroup] = Future()

    def join(self) -> None:
        """Joins the group, once; see `GroupProcess.join`."""
        threading.Thread(target=self._join, name="flowroll-join", daemon=True).start()
        try:
            self._joining.result(self._timeout_s + _PATIENCE_S)
        except TimeoutError:
            self.close("silence")
            where = f"{self._place['address']}:{self._place['port']}"
            raise unmet(self.name, self._place["world_size"], where, "silence", self._timeout_s) from None
        self.is_joined = True

    def _join(self) -> None:
        options = {**self._place, "device": str(self.device), "timeout_s": self._timeout_s}
        try:
            group = BroadcastGroup(self.name, backend="nccl", **options)
        except BaseException as error:
            self._joining.set_exception(error)
            return
        self._joining.set_result(group)
        if self._failure is not None:
            group.close(self._failure)

    @property
    def _group(self) -> BroadcastGroup:
        return self._joining.result(0)

    @property
    def has_failed(self) -> bool:
        """Whether the membership is closed, or has failed and can only be closed."""
        return self._failure is not None or (self.is_joined and self._group.has_failed)

    def has_lost_rank_0(self) -> bool:
        """Returns whether the store of rank 0 does not answer."""
        return self.is_joined and self._group.has_lost_rank_0()

    def turn(self) -> AbstractContextManager[None]:
        """Holds the membership for tensors that belong together; others wait."""
        turn: AbstractContextManager[None] = self._group.turn()
        return turn

    def receive_into(self, targets: Sequence[Tensor], flattened: bool) -> None:
        """Fills contiguous tensors; see `GlooMembership.receive_into`."""
        if self._failure is not None:
            raise broken(self.name, self._failure)
        for target in targets:
            _bytes_of(target).fill_(UNWRITTEN)
        if not flattened:
            for target in targets:
                self._group.broadcast(target)
            return
        sizes = [target.nbytes for target in targets]
        flat = torch.full((sum(sizes),), UNWRITTEN, dtype=torch.uint8, device=self.device)
        self._group.broadcast(flat)
        for target, part in zip(targets, torch.split(flat, sizes), strict=True):
            _bytes_of(target).copy_(part)

    def close(self, reason: str = "its end") -> None:
        """Ends the membership; whoever waits for tensors gets an error with this reason. It may be called twice."""
        self._failure = self._failure or reason
        if self._joining.done() and self._joining.exception() is None:
            self._group.close(reason)


Membership: TypeAlias = GlooMembership | NcclMembership


class WeightGroups:
    """The memberships of one engine, by the names of their groups. Several threads may use it at the same time.

    Args:
        limit: The largest number of memberships, with those that are joining: each holds a process or threads, even after its
            trainer was killed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._groups: dict[str, Membership] = {}
        self._lock = threading.Lock()

    def find(self, name: str, group_id: str | None = None) -> Membership:
        """Returns the membership in the group of this name.

        Args:
            name: The name of the group.
            group_id: Its id, where one that was made later is not meant; None: whichever it is.

        Raises:
            NotFoundError: There is no such group.
        """
        group = self._groups.get(name)
        if group is None or not group.is_joined or group_id not in (None, group.id):
            raise NotFoundError(f"group_name must be of a group, got {name[:80]}; init it first.", field="group_name")
        return group

    def join(self, group: Membership) -> None:
        """Joins a group. One of the same name is closed first, also if it is only joining: its trainer has begun again.

        No join waits for another one, and memberships that have failed are removed.

        Raises:
            WeightsBusyError: The engine is in too many groups.
            InvalidRequestError: The other members do not join.
        """
        with self._lock:
            former = self._groups.pop(group.name, None)
            self._groups = {other: one for other, one in self._groups.items() if not one.has_failed}
            if len(self._groups) >= self._limit:
                self._forget_lost()
            if is_admitted := len(self._groups) < self._limit:
                self._groups[group.name] = group
        if former is not None:
            former.close(_REPLACED)
        if not is_admitted:
            raise WeightsBusyError(
                f"the server must be in at most {self._limit} process groups, got one more than {listed(self._groups)}; "
                "destroy one of them first."
            )
        try:
            group.join()
        except BaseException:
            with self._lock:
                if self._groups.get(group.name) is group:
                    del self._groups[group.name]
            raise

    def leave(self, name: str) -> None:
        """Leaves a group.

        Raises:
            NotFoundError: There is no group with this name.
        """
        with self._lock:
            group = self._groups.pop(name, None)
        if group is None:
            raise NotFoundError(f"group_name must be of a group, got {name[:80]}; init it first.", field="group_name")
        group.close()

    def close(self) -> None:
        """Leaves all groups."""
        with self._lock:
            groups, self._groups = list(self._groups.values()), {}
        for group in groups:
            group.close()

    def _forget_lost(self) -> None:
        """Closes and removes the groups whose trainer has ended."""
        for name, group in list(self._groups.items()):
            if group.has_lost_rank_0():
                group.close()
                self._groups.pop(name, None)


def receive_from_group(
    incoming: WeightReceiver,
    group: Membership,
    heads: Sequence[TensorHead],
    *,
    flattened: bool = False,
    packed_bytes: int | None = None,
    sha256: str | None = None,
) -> None:
    """Receives a bucket of tensors from a process group. Requests may run meanwhile.

    Args:
        incoming: The receiver of the update that the bucket belongs to.
        group: The group, whose rank 0 sends the bucket.
        heads: The names, dtypes and shapes of its tensors, in the order in which they are sent.
        flattened: Whether all tensors are sent as one tensor of uint8 that holds their bytes in a row.
        packed_bytes: Where they are sent as several such tensors, as vLLM packs them: the size that each of these but the last
            is longer than by its last tensor. None: they are not.
        sha256: The `tensors_digest` of the tensors as hexadecimal digits, which is compared; None: it is not known.

    Raises:
        WeightsRejectedError: The update refuses the tensors, which is found before any is received, or the sender has ended, or
            sent other bytes than it announced. The bucket is dropped and the group is closed, since data that was not received
            would be taken for the next bucket.
    """
    try:
        with group.turn(), incoming.bucket(heads, device=group.device) as targets:
            if packed_bytes is None:
                group.receive_into(targets, flattened)
            else:
                for packed in _packed(targets, packed_bytes):
                    group.receive_into(packed, True)
            _check_written(heads, targets)
            if sha256 is not None and tensors_digest(targets) != sha256.lower():
                raise WeightsRejectedError(
                    "the bucket must have the sha256 that was sent with it, got another; broadcast the tensors that are named, "
                    "in their order and dtypes."
                )
    except BaseException:
        group.close(UNRECEIVED)
        raise


def _packed(targets: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yields the tensors that vLLM packs into one: as many as it takes for their bytes to be more than a size."""
    packed: list[Tensor] = []
    num_bytes = 0
    for target in targets:
        packed.append(target)
        num_bytes += target.nbytes
        if num_bytes > size:
            yield packed
            packed, num_bytes = [], 0
    if packed:
        yield packed


def _check_written(heads: Sequence[TensorHead], targets: Sequence[Tensor]) -> None:
    """Refuses tensors whose last element was not received. It would be NaN, but this says what was wrong."""
    for head, target in zip(heads, targets, strict=True):
        last = _bytes_of(target)[-target.itemsize :]
        if len(last) and bool((last == UNWRITTEN).all()):
            raise WeightsRejectedError(
                f"the sender must broadcast {head.name[:200]} as {head.dtype} {list(head.shape)[:8]}, got fewer bytes; "
                "announce what is sent."
            )


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
