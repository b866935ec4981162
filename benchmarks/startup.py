"""How long a user waits before anything happens: `python -m benchmarks.startup`.

Each command is a process of its own, started in turn with the others; wall time, medians.
"""

from __future__ import annotations

import argparse
import datetime
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import hardware

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measures, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="times that each command is started")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"startup_cpu_{today:%Y%m}.md"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        commands = {
            "python -c pass": ["-c", "pass"],
            "import torch": ["-c", "import torch"],
            "import flowroll": ["-c", "import flowroll"],
            "from flowroll import SamplingParams": ["-c", "from flowroll import SamplingParams"],
            "import flowroll.serving (the server's process)": ["-c", "import flowroll.serving"],
            "flowroll --help": ["-m", "flowroll", "--help"],
            "flowroll serve --help": ["-m", "flowroll", "serve", "--help"],
            "flowroll serve /no/such/folder": ["-m", "flowroll", "serve", "/no/such/folder"],
            "flowroll serve --port (in use)": ["-m", "flowroll", "serve", "--port", port],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(-1, options.rounds):
            for name, arguments in commands.items():
                started_s = time.perf_counter()
                subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
                if number >= 0:
                    times[name].append(time.perf_counter() - started_s)
    torch_s = statistics.median(times["import torch"])
    rows = [
        f"| `{name}` | {statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}] | "
        f"{statistics.median(found) / torch_s:.2f} |"
        for name, found in times.items()
    ]
    lines = [
        f"# Start-up, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.startup --rounds {options.rounds}`. {hardware()}; two cores.",
        "| command | s, median [least, most] | against `import torch` |\n|---|---|---|\n" + "\n".join(rows),
        "Aims: help at most 0.5 s, `import flowroll` at most 1.2 of `import torch`, a path or port that cannot be had refused "
        "in under 1 s.",
    ]
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
