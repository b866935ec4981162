"""A process group through which rank 0, a trainer, broadcasts tensors, beside the default group of a process.

It is the group that torch's own `_new_process_group_helper` makes after a `tcp://` rendezvous: the store's keys begin alike, so
that a trainer that makes its end that way, as SGLang's do, meets ours.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from flowroll.errors import InvalidRequestError, WeightsRejectedError

Backend: TypeAlias = Literal["gloo", "nccl"]

_POLL_S, _LONGEST_POLL_S = 0.0002, 0.01
# NCCL ends the process at its timeout, so its timeout is this many times ours.
_NCCL_PATIENCE = 10


class BroadcastGroup:
    """This process's membership in a process group through which rank 0 broadcasts tensors.

    Args:
        name: The group's name, the same in all of its processes.
        rank: The rank of this process; rank 0 sends.
        world_size: The number of processes of the group.
        backend: "gloo" for tensors on the CPU, "nccl" for tensors on GPUs.
        address: The address on which rank 0's store listens.
        port: The port on which rank 0's store listens.
        timeout_s: How many seconds to wait for the other processes, here and in every broadcast.
        device: The device of the tensors; a GPU for nccl.
        store: Rank 0's store, if this process is rank 0.

    Attributes:
        id: No other group has it, also none of the same name.
        device: The device of the tensors.

    Raises:
        InvalidRequestError: The other processes did not come, or this machine cannot take part.
    """

    def __init__(
        self,
        name: str,
        *,
        rank: int,
        world_size: int,
        backend: Backend,
        address: str,
        port: int,
        timeout_s: float,
        device: str = "cpu",
        store: Store | None = None,
    ) -> None:
        self.name, self._timeout_s = name, timeout_s
        self.id = secrets.token_hex(8)
        self.device = torch.device(device)
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._group: Any = None
        wanted = "cuda" if backend == "nccl" else "cpu"
        if self.device.type != wanted:
            raise InvalidRequestError(
                f"backend must be gloo for tensors on the CPU and nccl on GPUs, got {backend} on {device}; use the other.",
                field="backend",
            )
        timeout = timedelta(seconds=timeout_s)
        try:
            # Rank 0 may wait until the store has counted all of its workers.
            found = TCPStore(address, port, world_size, False, timeout) if store is None else store
            self._store: Store | None = found
            prefixed = PrefixStore(f"{self.device.type}/", PrefixStore(f"{name}/", PrefixStore(name, found)))
            self._group = (
                _gloo(prefixed, rank, world_size, timeout, address)
                if backend == "gloo"
                else _nccl(prefixed, rank, world_size, timeout * _NCCL_PATIENCE)
            )
        except (RuntimeError, OSError) as error:  # torch's errors of networks and stores are RuntimeErrors
            raise unmet(name, world_size, f"{address}:{port}", _first_line(error), timeout_s) from error

    def __enter__(self) -> BroadcastGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_failed(self) -> bool:
        """Whether the group is closed, or has failed and can only be closed."""
        return self._failure is not None

    def has_lost_rank_0(self) -> bool:
        """Asks the store of rank 0, and tells whether it does not answer."""
        store = self._store
        if store is None:
            return True
        try:
            store.check([self.name])
        except RuntimeError:
            return True
        return False

    @contextlib.contextmanager
    def turn(self) -> Any:
        """Holds the group for broadcasts that belong together; others wait."""
        with self._lock:
            yield

    def broadcast(self, tensor: Tensor, check: Callable[[], object] = lambda: None) -> None:
        """Sends a contiguous tensor, or fills it with rank 0's; returns when this process has finished.

        Args:
            tensor: A tensor on the group's device.
            check: A function that is called repeatedly; an exception from it ends the wait and the group.

        Raises:
            WeightsRejectedError: The other end is gone, or was silent for too long. The group can then only be closed.
        """
        if self._failure is not None:
            raise self._broken()
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            self._wait(self._start(tensor, options), check)
        except (RuntimeError, TimeoutError) as error:
            self._failure = _first_line(error)
            self._abort()
            raise self._broken() from error
        except BaseException as error:
            self._failure = _first_line(error)
            self._abort()
            raise

    def close(self, reason: str = "its end") -> None:
        """Leaves the group; a waiting broadcast ends with an error. It may be called twice.

        Args:
            reason: The reason that the error of a later broadcast gives.
        """
        if self._failure is None:
            self._failure = reason
            self._abort()

    def _start(self, tensor: Tensor, options: Any) -> Any:
        group = self._group
        if group is None:
            raise RuntimeError(self._failure)
        return group.broadcast([tensor], options)

    def _wait(self, work: Any, check: Callable[[], object]) -> None:
        deadline_s, pause_s = time.monotonic() + self._timeout_s, _POLL_S
        while not work.is_completed():
            check()
            if self._failure is not None:
                raise RuntimeError(self._failure)
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"silence for {self._timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        work.wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _abort(self) -> None:
        held, self._group, self._store = [self._group], None, None
        if held[0] is None:
            return
        with contextlib.suppress(RuntimeError):
            held[0].abort()
        # Threads and connections end with the object. gloo's destructor may wait until the timeout for a receive that never
        # ends, so it runs on a thread of its own.
        threading.Thread(target=held.clear, name="flowroll-group-end", daemon=True).start()

    def _broken(self) -> WeightsRejectedError:
        return broken(self.name, self._failure)


def unmet(name: str, world_size: int, place: str, reason: str, timeout_s: float) -> InvalidRequestError:
    """Makes the error of a group whose members did not meet; `place` is the address and port of rank 0's store."""
    return InvalidRequestError(
        f"master_address must be where rank 0 of {name} waits for {world_size} processes, got {place} ({reason}); start all of "
        f"them within {timeout_s:g} s.",
        field="master_address",
    )


def broken(name: str, reason: str | None) -> WeightsRejectedError:
    """Makes the error of a group that has failed or was closed."""
    return WeightsRejectedError(
        f"the group {name} must deliver every tensor, got {reason}; destroy it and make another.", field="group_name"
    )


def _gloo(store: Store, rank: int, world_size: int, timeout: timedelta, address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    # The group uses the interface that leads to rank 0; by default gloo uses the one to which the host's name resolves.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(address))]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _nccl(store: Store, rank: int, world_size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def _own_address(peer: str) -> str:
    """Returns this machine's address towards a peer. Connecting a datagram socket sends nothing; it only selects a route."""
    family, kind, protocol, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
