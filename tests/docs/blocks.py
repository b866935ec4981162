"""The code blocks of the documentation: what they are, and how a page's blocks are run in their order.

A ```python block runs in the namespace of the ones before it, a ```bash block in a shell, both in an empty folder of the page's
own. A ```bash block that is one `flowroll serve ...` starts that server, which runs until the page ends; the port 30000 of the
pages is replaced by a free one. A ```text block titled "Output" is what the block before it prints. A block whose title begins
with "Needs" says why it cannot run here (a GPU, Docker, the network); the page shows the title above it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowroll.examples.server import free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
# Reports are made by commands, which they name.
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not (path.parent.name == "parity" and path.stem != "README"))
LANGUAGES = frozenset({"python", "bash", "text", "json", "toml", "yaml", ""})
OUTPUT, NEEDS = "Output", "Needs "
_PORT = "127.0.0.1:30000"
_START_S = 120.0
_RUN_S = 600.0
_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One code block.

    Attributes:
        line: The line of the page on which its text begins.
        language: The first word behind the fence; empty: it is a figure.
        title: What the page shows above it; empty: nothing.
        text: What is in it.
    """

    line: int
    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether it can run on any machine."""
        return self.language in ("python", "bash") and not self.title.startswith(NEEDS)

    @property
    def served(self) -> list[str] | None:
        """The arguments of the server that it starts; None: it starts none."""
        if self.language != "bash" or not self.text.startswith("flowroll serve"):
            return None
        return shlex.split(self.text, comments=True)[2:]


def blocks_of(page: Path) -> list[Block]:
    """Returns the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = _TITLE.search(rest)
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(line=line, language=language, title=title[1] if title else "", text=match["text"]))
    return found


def run_page(page: Path, folder: Path) -> int:
    """Runs the blocks of a page; returns how many there were.

    Raises:
        AssertionError: A command failed, or an output is not what the page shows.
        Exception: What a Python block raised.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    address, printed, count = f"127.0.0.1:{free_port()}", "", 0
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        # What a page imports of its own folder.
        stack.callback(sys.path.remove, str(folder))
        sys.path.insert(0, str(folder))
        for block in blocks_of(page):
            text = block.text.replace(_PORT, address)
            if block.title == OUTPUT:
                shown = printed.replace(address, _PORT)
                assert shown.rstrip("\n") == block.text.rstrip("\n"), (
                    f"{page.name}:{block.line} shows something else than\n{shown}"
                )
            if not block.runs:
                continue
            count += 1
            if block.served is not None:
                stack.enter_context(_served(block.served, address, folder / f"server-{count}.log", environment))
            elif block.language == "bash":
                printed = _run_in_shell(text, environment, f"{page.name}:{block.line}")
            else:
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    # The lines of a traceback are those of the page.
                    exec(compile("\n" * block.line + text, str(page), "exec"), namespace)
                printed = output.getvalue()
    return count


def _run_in_shell(text: str, environment: dict[str, str], where: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", text]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_RUN_S)
    assert finished.returncode == 0, f"{where}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@contextlib.contextmanager
def _served(arguments: list[str], address: str, log: Path, environment: dict[str, str]) -> Iterator[None]:
    """Runs a server for the length of the block, which begins when it is ready."""
    command = [sys.executable, "-m", "flowroll", "serve", *arguments, "--port", address.rpartition(":")[2]]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(process, f"http://{address}", log, _START_S)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
