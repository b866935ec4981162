"""Notices when another rank of an engine ends or falls silent."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

from flowroll.parallel.channel import Channel, Pulse
from flowroll.parallel.processes import RankProcesses
from flowroll.parallel.rendezvous import second_connection

_POLL_S = 0.1
# A rank announces this, with the reason, before it ends because of an error.
ERRED = "erred"


class RankWatch:
    """Watches the other ranks until the engine closes or one of them is lost.

    Args:
        channel: Gives what the ranks have announced.
        processes: The ranks that this process started; None if torchrun has started them.
        num_ranks: The number of ranks of the engine.
        timeout_s: How long a rank may give no sign of life, in seconds.
        closing: Set when the engine closes; from then on a rank that ends is not reported.
        report: Called once, with the reason as a text, when a rank is lost.
    """

    def __init__(
        self,
        channel: Channel,
        processes: RankProcesses | None,
        *,
        num_ranks: int,
        timeout_s: float,
        closing: threading.Event,
        report: Callable[[str], None],
    ) -> None:
        self._channel, self._processes, self._num_ranks, self._timeout_s = channel, processes, num_ranks, timeout_s
        self._closing, self._report = closing, report

    def run(self, store: Store) -> None:
        """Checks the ranks ten times a second; it is the target of a thread.

        Args:
            store: The ranks' store; the signs of life use a second connection to it.
        """
        try:
            pulse = Pulse(second_connection(store), num_ranks=self._num_ranks)
            while not self._closing.wait(_POLL_S):
                if reason := self._ended_rank() or self._silent_rank(pulse):
                    self._report(reason)
                    return
        except Exception as error:
            self._report(f"the ranks' store must answer, got {type(error).__name__}: {error}; restart the engine.")

    def _ended_rank(self) -> str | None:
        if self._processes is None or not (ended := self._processes.ended()) or self._closing.is_set():
            return None
        rank, status = next(iter(ended.items()))
        if reason := self._channel.announced(ERRED).get(rank):
            return f"rank {rank} must run every step, got {reason}; see the log and restart the engine."
        how = f"its end by signal {-status}" if status < 0 else f"its end with status {status}"
        return f"rank {rank} must live as long as its engine, got {how}; see the log and restart the engine."

    def _silent_rank(self, pulse: Pulse) -> str | None:
        for rank, silence_s in pulse.silent_for_s().items():
            if silence_s > self._timeout_s:
                return (
                    f"rank {rank} must give a sign of life within {self._timeout_s:g} s, got {silence_s:.0f} s of silence; "
                    "look after its machine and restart the engine."
                )
        return None
