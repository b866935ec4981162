"""A server whose ranks torchrun started."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.distributed.jobs import Job, torchrun_job
from tests.serving.servers import SMALL, until

from flowroll.client import Client
from flowroll.engine import Engine

REQUEST = {**SMALL, "height": 192, "width": 192}
DOWN_S = 15.0


@contextmanager
def serving_job(folder: Path, logs: Path, *words: str) -> Iterator[tuple[Job, str]]:
    """`flowroll serve` on two ranks, and rank 0's address."""
    command = ["-m", "flowroll", "serve", str(folder), "--port", "0", "--device", "cpu", "--sp", "2", *words]
    with torchrun_job(command, 2, logs) as job:
        found: list[str] = []

        def listens() -> bool:
            assert all(process.poll() is None for process in job.processes), [job.log(rank) for rank in range(2)]
            found[:] = re.findall(r"listening on (http://\S+)", job.log(0))
            return bool(found)

        until(listens)
        yield job, found[0]


def test_rank_0_serves_with_the_bits_of_one_rank_and_a_signal_to_all_ends_all(z_image_checkpoint: Path, tmp_path: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        expected = engine.rollout(**{**REQUEST, "prompt": SMALL["prompt"]})[0]
    with serving_job(z_image_checkpoint, tmp_path) as (job, url):
        with Client(url) as client:
            answer = client.rollout(**REQUEST)[0]
        assert answer.log_probs is not None and expected.log_probs is not None
        assert answer.log_probs.tolist() == expected.log_probs.tolist()
        assert answer.image.tolist() == expected.image.tolist()
        for process in job.processes:
            process.send_signal(signal.SIGTERM)
        assert job.wait() == [0, 0]
    assert job.log(0).rstrip().endswith("stopped")
    assert "Traceback" not in job.log(0) + job.log(1)


@pytest.mark.slow
def test_a_rank_elsewhere_that_falls_silent_takes_the_server_down(z_image_checkpoint: Path, tmp_path: Path) -> None:
    with serving_job(z_image_checkpoint, tmp_path, "--rank-timeout-s", "3") as (job, url):
        assert httpx.get(f"{url}/readiness").status_code == 200
        job.processes[1].kill()
        assert job.processes[0].wait(DOWN_S) == 1
    assert "Error: rank 1 must give a sign of life within 3 s" in job.log(0)


def test_ranks_of_another_number_are_refused_on_rank_0(z_image_checkpoint: Path, tmp_path: Path) -> None:
    command = ["-m", "flowroll", "serve", str(z_image_checkpoint), "--port", "0", "--device", "cpu"]
    with torchrun_job(command, 2, tmp_path) as job:
        assert job.wait() == [1, 1]
    for rank in range(2):
        assert "Error: cfg x sp x tp must be the number of processes that torchrun started, got 1 (single) for 2" in job.log(
            rank
        )
