"""Carries messages between rank 0 and the other ranks through their store: commands one way, signs of life the other.

A collective has a timeout, so a rank cannot wait in one for the next request for an unlimited time; in a channel it can. The
messages are text that the caller encodes; nothing is pickled.
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
    """One end of the channel: that of rank 0, or that of a worker, which is a rank above 0.

    Args:
        store: The store that all ranks share.
        rank: The rank of this process.
        num_ranks: The number of ranks of the engine.
    """

    def __init__(self, store: Store, *, rank: int, num_ranks: int) -> None:
        self._store = store
        self._rank, self._workers = rank, range(1, num_ranks)
        self._next = self._oldest = 0
        self._stopped = threading.Event()

    def announce(self, stage: str, text: str = "") -> None:
        """Announces that this rank has reached a stage."""
        self._store.set(f"{stage}/{self._rank}", text)

    def announced(self, stage: str) -> dict[int, str]:
        """Returns the workers that have reached a stage, each with the text that it announced."""
        keys = {rank: f"{stage}/{rank}" for rank in self._workers}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def retract(self, stage: str) -> None:
        """Deletes the announcements of all workers, so that the stage can be reached again."""
        for rank in self._workers:
            self._store.delete_key(f"{stage}/{rank}")

    def wait_for(self, stage: str) -> None:
        """Waits until rank 0 has reached a stage."""
        self._store.wait([f"{stage}/0"], _FOREVER)

    def send(self, command: str) -> None:
        """Sends a command to all workers."""
        self._store.set(f"command/{self._next}", command)
        self._next += 1

    def receive(self) -> bytes:
        """Waits for the next command and returns it."""
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
        """Ends all workers, whether they are in a collective or wait for a command."""
        self._store.set(_DOWN, "")

    def beat(self, store: Store, on_down: Callable[[], object]) -> None:
        """Starts a thread that gives signs of life, and that notices when rank 0 takes the ranks down.

        Args:
            store: A connection for this thread alone, because the connection for commands is blocked while it waits.
            on_down: A function that is called when rank 0 takes the ranks down, or is gone.
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

        # The first sign is given at once, because a rank without any sign counts as not yet started.
        store.set(key, "0")
        threading.Thread(target=run, name="flowroll-beat", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread of `beat`."""
        self._stopped.set()


class Pulse:
    """Reads the workers' signs of life on rank 0.

    Args:
        store: A connection that nothing else uses.
        num_ranks: The number of ranks of the engine.
        now_s: A clock that returns seconds.
    """

    def __init__(self, store: Store, *, num_ranks: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._store, self._now_s = store, now_s
        self._last = {rank: ("", now_s()) for rank in range(1, num_ranks)}

    def silent_for_s(self) -> dict[int, float]:
        """Returns the seconds since each worker's last sign of life; 0 for a worker that has given none yet."""
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
