"""A process that is bound to its parent ends with it, whatever it does just then."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowroll.parallel.bound import unbind
from flowroll.parallel.processes import bound_command

DEAD_S = 2.0
PARENT = """
import subprocess, sys
from flowroll.parallel.processes import bound_command
subprocess.Popen(bound_command("idle_child"))
sys.stdin.read()
"""
CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize("stopped", [False, True])
def test_it_is_killed_with_its_parent_even_if_it_is_stopped(stopped: bool, tmp_path: Path) -> None:
    (tmp_path / "idle_child.py").write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if stopped:
        subprocess.run(["kill", "-STOP", str(pid)], check=True)
    parent.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    parent.wait()
    while is_alive(pid):
        assert time.monotonic() - killed_s < DEAD_S
        time.sleep(0.01)


def test_one_whose_parent_has_ended_already_ends_before_it_begins() -> None:
    command = bound_command("http.server", "0")
    command[command.index("http.server") - 1] = "1"
    assert subprocess.run(command, timeout=30).returncode == 70


def test_a_process_that_is_not_bound_may_be_freed() -> None:
    unbind()
