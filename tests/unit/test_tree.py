"""What is true of every file of the repository."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_file_holds_half_a_merge():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    names = [name for name in listed.split("\0") if name.endswith((".py", ".md", ".toml", ".txt"))]
    marks = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert len(names) > 100
    assert not [name for name in names if (ROOT / name).is_file() and marks.search((ROOT / name).read_text(encoding="utf-8"))]
