"""The processes that an engine consists of on this machine. They end when the process ends that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Run as a file: before the first import of the package, which takes seconds, the new process must be bound to its parent.
_BOUND = str(Path(__file__).with_name("bound.py"))
# A worker that outlives its standard input ends with this status.
ORPHANED = 70


def bound_command(module: str, *arguments: str) -> list[str]:
    """Returns the command for a Python module as a process that the kernel kills as soon as the calling thread has ended.

    The thread that starts such a process must live as long as the process is bound; see `bound.unbind`.
    """
    # -P: a file of the working folder is not taken for a module of the same name.
    return [sys.executable, "-P", _BOUND, str(os.getpid()), module, *arguments]


def worker_command() -> Sequence[str]:
    """Returns the command for a worker, which reads its configuration from the first line of its standard input."""
    return bound_command("flowroll.engine.runner")


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
        command = list(command or worker_command())
        self._processes: dict[int, subprocess.Popen[str]] = {}
        try:
            for rank, configuration in configurations.items():
                process = subprocess.Popen(
                    command,
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
