"""The README's example runs and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_prints_what_the_readme_shows(tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (position,) = [i for i, (language, text) in enumerate(blocks) if language == "python" and "Engine(" in text]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-c", blocks[position][1]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == blocks[position + 1][1]


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 700
