"""Where the ranks of an engine find each other: a store of their own on this machine's loopback interface, or torchrun's."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from flowroll.errors import InvalidRequestError
from flowroll.types import Layout

_LOOPBACK = "127.0.0.1"
_STORE_TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunRank:
    """This process's place among the processes that torchrun started.

    Attributes:
        rank: This process's rank among all processes.
        world_size: The number of processes.
        local_rank: This process's rank among those on this machine, which chooses the GPU.
    """

    rank: int
    world_size: int
    local_rank: int


def torchrun_rank(environment: Mapping[str, str] = os.environ) -> TorchrunRank | None:
    """Returns this process's place if torchrun started it, else None."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in environment for name in names):
        return None
    rank, world_size, local_rank = (int(environment[name]) for name in names[:3])
    return TorchrunRank(rank=rank, world_size=world_size, local_rank=local_rank)


def check_world(layout: Layout, place: TorchrunRank) -> None:
    """Refuses a layout that is not exactly the processes that torchrun started.

    Raises:
        InvalidRequestError: The numbers do not fit; the message names both.
    """
    if place.world_size != layout.num_ranks:
        raise InvalidRequestError(
            f"cfg x sp x tp must be the number of processes that torchrun started, got {layout.num_ranks} ({layout.name}) for "
            f"{place.world_size}; change --nproc-per-node or the degrees.",
            field="sp",
        )


def torchrun_store() -> Store:
    """Returns the store of a torchrun job. Each engine that the job's processes open in turn gets keys of its own."""
    store, rank, _ = next(rendezvous("env://", timeout=_STORE_TIMEOUT))
    opened = store.add(f"flowroll/opened/{rank}", 1)
    return PrefixStore(f"flowroll/{opened}", store)


def serve_store() -> tuple[Store, int]:
    """Makes a store on a free port of the loopback interface only, and returns it with the port."""
    # By itself torch would listen on every interface; it uses a socket that is already bound as it is.
    with socket.create_server((_LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
        store = TCPStore(
            _LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT, master_listen_fd=listener.detach()
        )
    return store, port


def join_store(port: int) -> Store:
    """Connects to the store that rank 0 serves on this machine."""
    store: Store = TCPStore(_LOOPBACK, port, is_master=False, timeout=_STORE_TIMEOUT)
    return store


def second_connection(store: Store) -> Store:
    """Makes another connection to the same keys, because a connection that waits for a key can do nothing else."""
    connection: Store = store.clone()  # type: ignore[attr-defined]
    return connection


def rank_device(first: torch.device, rank: int) -> torch.device:
    """Returns the device of a rank on this machine: the CPU for all ranks, or the GPU `rank` places after the first."""
    return first if first.type == "cpu" else torch.device(first.type, (first.index or 0) + rank)


def check_devices(layout: Layout, first: torch.device, num_devices: int) -> None:
    """Refuses more ranks than this machine has GPUs.

    Raises:
        InvalidRequestError: The numbers do not fit; the message names both.
    """
    free = num_devices - (first.index or 0)
    if first.type != "cpu" and layout.num_ranks > free:
        raise InvalidRequestError(
            f"cfg x sp x tp must be at most the {free} GPUs from {first} on, got {layout.num_ranks} ({layout.name}); lower a "
            "degree, or use torchrun across machines.",
            field="sp",
        )
