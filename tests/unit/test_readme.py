"""The README's program runs as it stands and teaches the policy what the README shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

from flowroll.checkpoints import shapes_checkpoint
from flowroll.examples.server import running_server

README = Path(__file__).parents[2] / "README.md"
_ROUND = re.compile(r"round (\d+): reward (-?\d\.\d{3})")


def test_the_program_learns_as_the_readme_shows(tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (position,) = [place for place, (language, _) in enumerate(blocks) if language == "python"]
    program, shown = blocks[position][1], blocks[position + 1][1]
    assert "flowroll serve shapes-z_image" in README.read_text(encoding="utf-8") and "http://127.0.0.1:30000" in program
    with running_server(shapes_checkpoint("z_image"), tmp_path / "log") as server:
        finished = subprocess.run(
            [sys.executable, "-c", program.replace("http://127.0.0.1:30000", server.url)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert finished.returncode == 0, finished.stderr
    rounds, promised = _ROUND.findall(finished.stdout), _ROUND.findall(shown)
    # Other CPUs have other bits; what is learned is the same.
    assert [number for number, _ in rounds] == [number for number, _ in promised] == list(map(str, range(6)))
    first, last = (float(rounds[place][1]) for place in (0, -1))
    assert last > first and abs(last - float(promised[-1][1])) < (last - first) / 2


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 700
