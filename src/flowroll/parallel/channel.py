"""Carries messages between rank 0 and the other ranks through their store: commands one way, signs of life the other.

A collective has a timeout, so nobody can wait in one for a request that may come tomorrow; here a rank can wait as long as it
takes. The messages are text that the caller encodes; nothing is pickled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

_FOREVER = timedelta(days=365)
_BEAT_S = 1.0
_DOWN = "down"


class Channel:
    """Holds the end of rank 0, or that of a worker, which is a rank above 0.

    Args:
        store: Shared by all ranks.
        rank: Of this process.
        num_ranks: Number of ranks of the engine.
    """

    def __init__(self, store: Store, *, rank: int, num_ranks: int) -> None:
        self._store = store
        self._rank, self._workers = rank, range(1, num_ranks)
        self._next = self._oldest = 0
        self._stopped = threading.Event()

    def announce(self, stage: str, text: str = "") -> None:
        """Tells that this rank has reached a stage."""
        self._store.set(f"{stage}/{self._rank}", text)

    def announced(self, stage: str) -> dict[int, str]:
        """Returns the workers that have reached a stage, with what they said."""
        keys = {rank: f"{stage}/{rank}" for rank in self._workers}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def retract(self, stage: str) -> None:
        """Deletes what all workers announced, so that the stage can be reached again."""
        for rank in self._workers:
            self._store.delete_key(f"{stage}/{rank}")

    def wait_for(self, stage: str) -> None:
        """Waits until rank 0 has reached a stage."""
        self._store.wait([f"{stage}/0"], _FOREVER)

    def send(self, command: str) -> None:
        """Gives all workers a command."""
        self._store.set(f"command/{self._next}", command)
        self._next += 1

    def receive(self) -> bytes:
        """The next command, as soon as there is one."""
        key = f"command/{self._next}"
        self._store.wait([key], _FOREVER)
        self._next += 1
        command: bytes = self._store.get(key)
        return command

    def forget(self) -> None:
        """Deletes all commands that were sent; every worker must have received them."""
        for number in range(self._oldest, self._next):
            self._store.delete_key(f"command/{number}")
        self._oldest = self._next

    def take_down(self) -> None:
        """Ends all workers, wherever they are: in a collective, or waiting for a command."""
        self._store.set(_DOWN, "")

    def beat(self, store: Store, on_down: Callable[[], object]) -> None:
        """Gives signs of life from now on, on a thread, and listens for the end.

        Args:
            store: A connection for it alone: the commands' one is busy with waiting.
            on_down: Called when rank 0 takes the ranks down, or is gone.
        """
        key = f"beat/{self._rank}"

        def run() -> None:
            number = 0
            while not self._stopped.wait(_BEAT_S):
                number += 1
                try:
                    store.set(key, str(number))
                    down = store.check([_DOWN])
                except Exception:  # the store is gone, and rank 0 with it
                    down = True
                if down and not self._stopped.is_set():
                    on_down()
                    return

        # The first at once: a rank that never gave one counts as not yet begun.
        store.set(key, "0")
        threading.Thread(target=run, name="flowroll-beat", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread of `beat`."""
        self._stopped.set()


class Pulse:
    """Hears the workers' signs of life on rank 0.

    Args:
        store: A connection for it alone.
        num_ranks: Number of ranks of the engine.
        now_s: A clock.
    """

    def __init__(self, store: Store, *, num_ranks: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._store, self._now_s = store, now_s
        self._last = {rank: ("", now_s()) for rank in range(1, num_ranks)}

    def silent_for_s(self) -> dict[int, float]:
        """Returns the seconds since each worker's last sign of life; 0 for one that has not begun to give any."""
        silences = {}
        for rank, (beat, since_s) in self._last.items():
            key = f"beat/{rank}"
            heard = self._store.get(key).decode() if self._store.check([key]) else ""
            if heard != beat or not heard:
                self._last[rank] = (heard, self._now_s())
                silences[rank] = 0.0
            else:
                silences[rank] = self._now_s() - since_s
        return silences
