"""The other ranks of an engine, seen from rank 0. An engine of one rank has `NoPeers`, and no other difference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.runner.messages import Message
from flowroll.errors import FlowrollError, RankLostError, WeightsRejectedError
from flowroll.families import ModelSpec
from flowroll.parallel.mesh import Mesh

FailureListener = Callable[[RankLostError], None]


@runtime_checkable
class Peers(Protocol):
    """What rank 0 does with the other ranks."""

    @property
    def mesh(self) -> Mesh | None:
        """The collectives of all ranks; None: there is one rank."""

    @property
    def failure(self) -> RankLostError | None:
        """Why the ranks are down; None while they are up."""

    @property
    def pids(self) -> Mapping[int, int]:
        """Process ids of the ranks that were started here, by rank."""

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """Bytes that rank 0 has received from other ranks, by mesh axis."""

    def serve(self, spec: ModelSpec, limits: Limits) -> None:
        """Waits until every rank has loaded its part.

        Raises:
            CheckpointError: A rank could not.
            RankLostError: A rank ended.
        """

    def send(self, message: Message, tensors: Iterable[Tensor] = ()) -> None:
        """Sends a message, and after it the data of the tensors that it describes.

        Raises:
            RankLostError: The ranks are down.
        """

    def together(self) -> AbstractContextManager[None]:
        """Surrounds what all ranks do at the same time. An error of one rank alone ends all: the others wait for it."""

    def compare(self, tensor: Tensor) -> list[int]:
        """Returns the ranks whose tensor does not have this rank's bits; all ranks call it at the same time."""

    def stage(self, message: Message, *, field: str | None = None, error: type[FlowrollError] = WeightsRejectedError) -> None:
        """Has every rank prepare a change, and waits for all; whether it is made is told by a later message.

        Raises:
            error: A rank could not; all have dropped what they prepared.
            RankLostError: A rank ended.
        """

    def add_listener(self, listener: FailureListener) -> None:
        """Calls the listener, on another thread, if the ranks fail; at once if they have."""

    def close(self) -> None:
        """Ends the other ranks; may be called twice."""


class NoPeers:
    """The peers of an engine of one rank."""

    mesh: Mesh | None = None
    failure: RankLostError | None = None

    @property
    def pids(self) -> Mapping[int, int]:
        """No process."""
        return {}

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """No bytes."""
        return {}

    def serve(self, spec: ModelSpec, limits: Limits) -> None:
        """Waits for nobody."""

    def send(self, message: Message, tensors: Iterable[Tensor] = ()) -> None:
        """Sends nothing."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Errors pass as they are: nobody waits."""
        yield

    def compare(self, tensor: Tensor) -> list[int]:
        """No rank has other bits."""
        return []

    def stage(self, message: Message, *, field: str | None = None, error: type[FlowrollError] = WeightsRejectedError) -> None:
        """Nobody has to prepare."""

    def add_listener(self, listener: FailureListener) -> None:
        """Nobody can fail."""

    def close(self) -> None:
        """Ends nobody."""
