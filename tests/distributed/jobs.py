"""Jobs of several ranks, started as torchrun starts them: one process per rank, and an agent that holds their store."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

WAIT_S = 240.0


class Job:
    """The processes of a job, by rank."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]], logs: Sequence[Path]) -> None:
        self.processes, self._logs = processes, logs

    def wait(self) -> list[int]:
        """The exit status of every rank."""
        return [process.wait(WAIT_S) for process in self.processes]

    def log(self, rank: int) -> str:
        return self._logs[rank].read_text()


@contextmanager
def torchrun_job(command: Sequence[str], num_ranks: int, logs: Path) -> Iterator[Job]:
    """Runs `python COMMAND...` on every rank; none of them is left when the block ends."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, files = [], []
    try:
        for rank in range(num_ranks):
            files.append(logs / f"rank-{rank}.log")
            with files[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                        env={**os.environ, **_environment(rank, num_ranks, store), "PYTHONPATH": os.pathsep.join(sys.path)},
                    )
                )
        yield Job(processes, files)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _environment(rank: int, num_ranks: int, store: TCPStore) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
