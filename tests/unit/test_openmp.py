"""A thread that waits holds no OpenMP threads, so that those of others may wait actively."""

import subprocess
import sys
from pathlib import Path

import pytest

from flowroll import openmp

pytestmark = pytest.mark.skipif(openmp._pause is None, reason="torch uses another OpenMP library")

# What the programs of the tests share: `others` counts the threads of the process that Python does not know.
_COUNT = """
import os, threading, time
import torch
torch.set_num_threads(3)

def others():
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())

def work():
    return torch.randn(1 << 20).exp()
"""


def _run(program: str, *arguments: object) -> list[int]:
    command = [sys.executable, "-c", _COUNT + program, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return [int(number) for number in found.stdout.split()]


def test_a_team_ends_and_starts_again() -> None:
    before, with_team, released, again, num_threads = _run("""
from flowroll.openmp import release_team
before = others()
work()
with_team = others()
release_team()
released = others()
work()
print(before, with_team, released, others(), torch.get_num_threads())
""")
    assert with_team == again == before + 2
    assert released == before
    assert num_threads == 3


def test_an_engine_that_waits_has_no_team_and_its_caller_has_none(z_image_checkpoint: Path) -> None:
    loaded, used = _run(
        """
import sys
from flowroll.engine import Engine
from flowroll.openmp import release_team

def settled(least):
    # The stages give theirs back after the answer is made.
    deadline_s = time.monotonic() + 20
    while others() > least and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return others()

with Engine(sys.argv[1], dtype="float32", device="cpu") as engine:
    loaded = others()
    release_team()
    assert others() == loaded, "loading leaves no team"
    work()
    assert others() > loaded
    engine.rollout("a fox", height=64, width=64, num_inference_steps=2, num_outputs_per_prompt=2)
    print(loaded, settled(loaded))
""",
        z_image_checkpoint,
    )
    assert used == loaded
