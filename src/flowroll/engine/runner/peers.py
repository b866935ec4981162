"""The interface through which rank 0 reaches the other ranks. An engine of one rank differs only in that it has `NoPeers`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.runner.changes import AnyChange
from flowroll.engine.runner.messages import Message
from flowroll.errors import RankLostError
from flowroll.families import ModelSpec
from flowroll.parallel.mesh import Mesh

FailureListener = Callable[[RankLostError], None]


@runtime_checkable
class Peers(Protocol):
    """Everything that rank 0 can do with the other ranks."""

    @property
    def mesh(self) -> Mesh | None:
        """The collectives of all ranks; None if there is only one rank."""

    @property
    def failure(self) -> RankLostError | None:
        """The error that took the ranks down; None while they are up."""

    @property
    def pids(self) -> Mapping[int, int]:
        """The process ids of the ranks that this process started, by rank."""

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """The number of bytes that rank 0 has received from other ranks, by mesh axis."""

    def serve(self, spec: ModelSpec, limits: Limits) -> None:
        """Waits until every rank has loaded its part.

        Raises:
            CheckpointError: A rank could not load its part.
            RankLostError: A rank has ended.
        """

    def send(self, message: Message, tensors: Iterable[Tensor] = ()) -> None:
        """Sends a message, followed by the data of the tensors that it describes.

        Raises:
            RankLostError: The ranks are down.
        """

    def together(self) -> AbstractContextManager[None]:
        """Encloses an operation that all ranks run together. An error on one rank ends all, because the others wait for it."""

    def compare(self, tensor: Tensor) -> list[int]:
        """Returns the ranks whose tensor does not have this rank's bits; all ranks call it at the same time."""

    def stage(self, change: AnyChange) -> None:
        """Makes every rank prepare a change, and waits for all. A later message puts the change into effect or drops it.

        Raises:
            FlowrollError: A rank could not prepare the change (`Change.error`); all ranks have dropped it.
            RankLostError: A rank has ended.
        """

    def add_listener(self, listener: FailureListener) -> None:
        """Calls the listener on another thread when a rank fails, or immediately if one has failed already."""

    def lose(self, message: str) -> None:
        """Ends the ranks and calls the listeners: one can run nothing more. Only the first call has an effect."""

    def close(self) -> None:
        """Ends the other ranks. May be called twice."""


class NoPeers:
    """The `Peers` of an engine of one rank: there is no other rank, so nothing is sent or awaited."""

    mesh: Mesh | None = None

    def __init__(self) -> None:
        self.failure: RankLostError | None = None
        self._listeners: list[FailureListener] = []

    @property
    def pids(self) -> Mapping[int, int]:
        """Returns an empty mapping: there are no other processes."""
        return {}

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """Returns an empty mapping: nothing is received."""
        return {}

    def serve(self, spec: ModelSpec, limits: Limits) -> None:
        """Does nothing: there is no rank to wait for."""

    def send(self, message: Message, tensors: Iterable[Tensor] = ()) -> None:
        """Does nothing: there is no rank to send to."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Lets errors pass unchanged: no rank waits for this one."""
        yield

    def compare(self, tensor: Tensor) -> list[int]:
        """Returns an empty list: there is no rank that could differ."""
        return []

    def stage(self, change: AnyChange) -> None:
        """Does nothing: there is no rank that has to prepare."""

    def add_listener(self, listener: FailureListener) -> None:
        """Calls the listener on a thread of its own once this rank can run nothing more."""
        self._listeners.append(listener)
        if self.failure is not None:
            listener(self.failure)

    def lose(self, message: str) -> None:
        """Calls the listeners: this rank can run nothing more. Only the first call has an effect."""
        if self.failure is None:
            self.failure = RankLostError(message)
            for listener in self._listeners:
                threading.Thread(target=listener, args=(self.failure,), daemon=True).start()

    def close(self) -> None:
        """Does nothing: there is no rank to end."""
