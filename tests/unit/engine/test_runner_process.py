"""How the process of a rank ends: with its error, or without a word where rank 0 has ended."""

import os
import subprocess
import sys
import time

import msgspec
import pytest

from flowroll.engine.runner.rank_group import RankConfig
from flowroll.parallel.processes import ORPHANED
from flowroll.types import Layout

WAIT_S = 120.0
# A rank that works until its connection to rank 0, the pipe of this number, ends.
CODE = """
import os, sys
from flowroll.engine.runner import __main__ as runner

def work(*_):
    print("working", flush=True)
    os.read(int(sys.argv[1]), 1)
    raise ConnectionError("rank 0 is silent")

runner.run_worker = work
runner.join_store = runner.rank_device = lambda *_: None
runner.main()
"""
CONFIG = RankConfig(
    model="", variant="base", dtype="float32", device="cpu", layout=Layout(sp=2), timeout_s=1.0, num_threads=1, rank=1, port=1
)


@pytest.mark.parametrize("is_over", [True, False], ids=["rank 0 has ended", "rank 0 lives"])
def test_a_rank_that_lost_its_connection_tells_why_unless_rank_0_has_ended(is_over: bool) -> None:
    connection, other = os.pipe()
    worker = subprocess.Popen(
        [sys.executable, "-c", CODE, str(connection)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[connection],
    )
    assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
    with worker:
        worker.stdin.write(msgspec.json.encode(CONFIG) + b"\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == b"working\n"
        # The kernel ends the connections of a killed process one after the other.
        os.close(other)
        if is_over:
            time.sleep(0.1)
            worker.stdin.close()
        status = worker.wait(WAIT_S)
        said = worker.stderr.read().decode()
    os.close(connection)
    assert status == (ORPHANED if is_over else 1)
    assert ("rank 0 is silent" in said) is not is_over, said
