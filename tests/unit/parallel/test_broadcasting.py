"""A process group's end: nothing of it stays, and nobody waits for it."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import TCPStore

from flowroll.errors import WeightsRejectedError
from flowroll.parallel.broadcasting import BroadcastGroup

PATIENCE_S, WAIT_S = 600.0, 60.0


def pair() -> list[BroadcastGroup]:
    """Rank 0 and rank 1; the store goes with them."""
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)

    def make(rank: int) -> BroadcastGroup:
        return BroadcastGroup(
            "g",
            rank=rank,
            world_size=2,
            backend="gloo",
            address="127.0.0.1",
            port=store.port,
            timeout_s=PATIENCE_S,
            store=None if rank else store,
        )

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(make, range(2)))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")
def test_groups_that_have_failed_hold_no_threads_and_no_descriptors() -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def fail() -> BroadcastGroup:
        trainer, server = pair()
        trainer.close()
        with pytest.raises(WeightsRejectedError):
            server.broadcast(torch.zeros(4))
        assert server.has_failed and server.has_lost_rank_0()
        return server

    kept = [fail()]
    before = held()
    # As a server keeps them until their trainer destroys them.
    kept += [fail() for _ in range(5)]
    deadline_s = time.monotonic() + WAIT_S
    while any(now > then + 2 for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline_s, (held(), before)
        time.sleep(0.05)


def test_nobody_waits_for_a_receive_that_nothing_ends() -> None:
    trainer, server = pair()
    errors: list[Exception] = []

    def receive() -> None:
        try:
            server.broadcast(torch.zeros(4))
        except WeightsRejectedError as error:
            errors.append(error)

    def leave() -> None:
        nonlocal server
        server.close()
        waiting.join()
        del server

    waiting = threading.Thread(target=receive)
    waiting.start()
    time.sleep(0.3)
    assert not errors
    leaving = threading.Thread(target=leave)
    leaving.start()
    leaving.join(WAIT_S)
    # And not for the object, whose end waits in C++ for the whole patience.
    assert not leaving.is_alive() and "got its end" in str(errors[0])
    trainer.close()
