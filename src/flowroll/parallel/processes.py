"""The processes of the other ranks on this machine. They end when this process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

# What a worker is started as; it reads its configuration from the first line of its standard input.
# -P: a file of the working folder is not taken for a module of the same name.
WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "flowroll.engine.runner")
# A worker that outlives its standard input ends with this status.
ORPHANED = 70


class RankProcesses:
    """Starts one process per worker, a rank above 0, and ends them.

    A worker's standard input holds its configuration and then nothing; when it ends, because this
    process has ended in whatever way, the worker ends too. Workers are in sessions of their own, so a Ctrl-C at the
    terminal reaches this process alone, which then ends them in order.

    Args:
        configurations: The configuration of each worker by rank, one line of text.
        command: The command that starts a worker.
    """

    def __init__(self, configurations: Mapping[int, str], *, command: Sequence[str] | None = None) -> None:
        self._processes: dict[int, subprocess.Popen[str]] = {}
        try:
            for rank, configuration in configurations.items():
                process = subprocess.Popen(
                    list(command or WORKER_COMMAND),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                )
                self._processes[rank] = process
                assert process.stdin is not None
                process.stdin.write(configuration + "\n")
                process.stdin.flush()
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """The process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def ended(self) -> dict[int, int]:
        """Returns the ranks that have ended, each with its exit status (the negative signal number if a signal ended it)."""
        return {rank: status for rank, process in self._processes.items() if (status := process.poll()) is not None}

    def join(self, timeout_s: float) -> None:
        """Waits until all workers have ended, and kills those that take longer."""
        deadline_s = time.monotonic() + timeout_s
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """Kills all workers at once and waits for them, so that no process and no zombie is left."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def read_configuration() -> str:
    """Reads a worker's configuration. From then on the process ends when rank 0's does."""
    line = sys.stdin.readline()

    def watch() -> None:
        sys.stdin.read()
        # A plain exit would wait for the main thread, which may be in a collective that never returns.
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="flowroll-lifeline", daemon=True).start()
    return line
