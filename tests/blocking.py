"""Child processes in which some libraries cannot be imported, as if they were not installed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

_PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Packages that are imported by another name than they are installed by.
_MODULES = {"pillow": "PIL", "prometheus-client": "prometheus_client"}
_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def modules_of(extra: str) -> set[str]:
    """The libraries that an extra brings, with those of the extras in it, by the names that they are imported by."""
    found = set()
    for requirement in _PYPROJECT["optional-dependencies"][extra]:
        name = requirement.partition(">")[0]
        if name.startswith("flowroll["):
            for part in name.removeprefix("flowroll[").rstrip("]").split(","):
                found |= modules_of(part)
        else:
            found.add("opentelemetry" if name.startswith("opentelemetry") else _MODULES.get(name, name))
    return found


# All that a client does not bring; starlette comes with fastapi, and typer brings pydantic.
BEYOND_THE_CLIENT = {"starlette"}.union(*map(modules_of, ("server", "lora", "otel"))) - modules_of("client") - {"pydantic"}


def run_without(blocked: set[str], program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in a process where importing one of `blocked` fails."""
    command = [sys.executable, "-c", f"BLOCKED = {sorted(blocked)!r}\n{_BLOCKER}\n{program}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def cli_without(blocked: set[str], *words: Any) -> subprocess.CompletedProcess[str]:
    """Runs `flowroll` as `run_without` does."""
    return run_without(blocked, "from flowroll.cli import app; app()", *words)
