"""Temporary folders: none is left over by a process that was killed, and none is taken from one that lives."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flowroll.engine import scratch

KILLED = """
import os, runpy, sys
scratch_folder = runpy.run_path(sys.argv[1])["scratch_folder"]
with scratch_folder() as folder:
    (folder / "weights").write_bytes(bytes(100))
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_start_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_YOUNG_S", 0.0)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, scratch.__file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    left = Path(killed.stdout.strip())
    assert (left / "weights").is_file() and left.parent == tmp_path
    (tmp_path / "flowroll-checkpoints").mkdir()
    with scratch.scratch_folder() as used:
        assert scratch.sweep_scratch() == [left]
        assert used.is_dir()
    assert os.listdir(tmp_path) == ["flowroll-checkpoints"]
