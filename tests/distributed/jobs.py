"""Jobs of several ranks, started as torchrun starts them: one process per rank, and an agent that holds their store."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

WAIT_S = 240.0
# What takes a rank most of its start, imported once for all of them.
_PRELOAD = ["flowroll.engine", "flowroll.wire.files", "transformers.models.qwen2_5_vl", "transformers.models.qwen3"]


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


def run_ranks(function: Callable[..., None], arguments: Sequence[object], num_ranks: int, logs: Path) -> None:
    """Calls `function(*arguments)` in a process per rank, started as by torchrun but forked from one that has imported torch.

    Raises:
        AssertionError: A rank ended with another status than 0; with the end of its log.
    """
    context = multiprocessing.get_context("forkserver")
    assert isinstance(context, ForkServerContext)
    context.set_forkserver_preload(_PRELOAD)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [logs / f"rank-{rank}.log" for rank in range(num_ranks)]
    ranks = [
        context.Process(target=_run_rank, args=(function, arguments, _environment(rank, num_ranks, store), file))
        for rank, file in enumerate(files)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(WAIT_S)
        assert [rank.exitcode for rank in ranks] == [0] * num_ranks, [file.read_text()[-2000:] for file in files]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _run_rank(function: Callable[..., None], arguments: Sequence[object], environment: Mapping[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)


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
