"""A server whose engine, or one of whose ranks, or which itself is sent a signal at a moment that a test has chosen.

`python -m tests.serving.striking MOMENT TARGET SIGNAL SKIPPED OPTIONS` serves; the engine's process starts as
`python -m tests.serving.striking MOMENT TARGET SIGNAL SKIPPED DESCRIPTOR`.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def strike_at(owner: Any, name: str, target: str, sig: int, skipped: int) -> None:
    """Has the call after so many begin with the signal."""
    original, calls = getattr(owner, name), itertools.count()

    def striking(*arguments: Any, **options: Any) -> Any:
        if next(calls) == skipped:
            os.kill(process(target), sig)
        return original(*arguments, **options)

    setattr(owner, name, striking)


def process(target: str) -> int:
    """The process that is struck, seen from the engine's process, or the server's."""
    is_engine = sys.argv[-1].isdigit()
    if target == "server":
        return os.getppid() if is_engine else os.getpid()
    engine = os.getpid() if is_engine else children_of(os.getpid())[0]
    return engine if target == "engine" else children_of(engine)[0]


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def be_engine(moment: str, target: str, sig: int, skipped: int) -> None:
    from flowroll.engine.runner import model_runner
    from flowroll.engine.runner.executor import Executor
    from flowroll.engine.service import __main__ as engine
    from flowroll.engine.weights.versions import VersionState

    owners = {
        "encoding": (Executor, "encode"),
        "stepping": (model_runner, "forward"),
        "decoding": (Executor, "decode"),
        "committing": (VersionState, "after"),
    }
    if moment in owners:
        strike_at(*owners[moment], target, sig, skipped)
    sys.argv[1:] = sys.argv[-1:]
    engine.main()


def be_server(moment: str, target: str, sig: int, skipped: int, options: dict[str, Any]) -> None:
    from flowroll.serving import ServerConfig, serve
    from flowroll.types import Layout
    from flowroll.wire.body import Segment

    if moment == "sending":
        strike_at(Segment, "piece", target, sig, skipped)
    start = subprocess.Popen

    def start_engine(command: list[str], *arguments: Any, **more: Any) -> Any:
        if "flowroll.engine.service" in command:
            command = [sys.executable, "-m", "tests.serving.striking", *sys.argv[1:-1], command[-1]]
        return start(command, *arguments, **more)

    subprocess.Popen = start_engine  # type: ignore[misc, assignment]
    options["layout"] = Layout.parse(options["layout"])
    serve(ServerConfig(**options))


if __name__ == "__main__":
    chosen = (sys.argv[1], sys.argv[2], int(signal.Signals[sys.argv[3]]), int(sys.argv[4]))
    if sys.argv[-1].isdigit():
        be_engine(*chosen)
    else:
        be_server(*chosen, json.loads(sys.argv[-1]))
