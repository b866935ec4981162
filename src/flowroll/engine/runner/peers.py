"""Rank 0's way to the other ranks of its engine. An engine of one rank differs only in that its `Peers` do nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.runner.changes import AnyChange
from flowroll.engine.runner.messages import Message
from flowroll.errors import RankLostError
from flowroll.families import ModelSpec
from flowroll.parallel.mesh import Mesh

FailureListener = Callable[[RankLostError], None]


class Peers:
    """Everything that rank 0 can do with the other ranks. Of this class itself there are none; `RankGroup` has several.

    Attributes:
        mesh: The collectives of all ranks; None if there is only one rank.
        failure: The error that took the ranks down; None while they are up.
    """

    def __init__(self) -> None:
        self.mesh: Mesh | None = None
        self.failure: RankLostError | None = None
        self._listeners: list[FailureListener] = []
        self._lock = threading.Lock()

    @property
    def pids(self) -> Mapping[int, int]:
        """The process ids of the ranks that this process started, by rank."""
        return {}

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """The number of bytes that rank 0 has received from other ranks, by mesh axis."""
        return {}

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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Encloses an operation that all ranks run together.

        With other ranks, an error on one ends all of them, because they wait for it; an error of a lone rank passes unchanged.
        """
        yield

    def compare(self, tensor: Tensor) -> list[int]:
        """Returns the ranks whose tensor does not have this rank's bits; all ranks call it at the same time."""
        return []

    def stage(self, change: AnyChange) -> None:
        """Makes every other rank prepare a change, and waits for all. A later message puts it into effect or drops it.

        Raises:
            FlowrollError: A rank could not prepare the change (`Change.error`); all ranks have dropped it.
            RankLostError: A rank has ended.
        """

    def add_listener(self, listener: FailureListener) -> None:
        """Calls the listener on another thread when a rank fails, or immediately if one has failed already."""
        with self._lock:
            self._listeners.append(listener)
            failure = self.failure
        if failure is not None:
            listener(failure)

    def lose(self, message: str) -> None:
        """Ends the ranks and calls the listeners: one can run nothing more. Only the first call has an effect."""
        if self.failure is None:
            self.failure = RankLostError(message)
            for listener in self._listeners:
                threading.Thread(target=listener, args=(self.failure,), daemon=True).start()

    def close(self) -> None:
        """Ends the other ranks. May be called twice."""
