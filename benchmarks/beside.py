"""What a denoising step costs while the server sends large answers: with the engine in its own process, and in the server's.

`python -m benchmarks.beside`: a server of each kind in turn. Clients ask for answers of about 200 MB and do not read them yet.
Then one client generates small images all the time, first alone, then while the others read. An image's `inference_time_s`
over its steps is the time of a step. Nothing else is generated meanwhile. The readers take bytes off plain sockets and look at
none of them: in earnest they run on other machines.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from benchmarks.measure import hardware

RESULTS = Path(__file__).parent / "results"
ACCEPT = ("application/json", "application/msgpack", "application/json")
# 48 steps of 1 MiB latents, four tensors of them a step: 200 MB.
LARGE: dict[str, Any] = {
    "prompt": "two wine glasses",
    "width": 1024,
    "height": 1024,
    "num_inference_steps": 48,
    "guidance_scale": 0.0,
}
SMALL: dict[str, Any] = {"prompt": "a cup", "width": 64, "height": 64, "num_inference_steps": 50, "guidance_scale": 0.0}
# Whether the engine is in the server's process, and whether it has a core to itself: the first; all others use the second.
PLACES = {
    "in its own process, a core free": (False, True),
    "in its own process": (False, False),
    "in the server's process": (True, False),
}
ALONE_S = 6.0


def main() -> None:
    """Measures; with --serve it is a server whose engine is in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times that each server is measured")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    parser.add_argument("--serve", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve)
        return
    if options.read:
        _read(*options.read)
        return
    # Here: a process that only reads does not need the model libraries.
    from flowroll.testing import make_checkpoint

    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"beside_cpu_{today:%Y%m}.md"
    found: dict[str, list[tuple[float, float, float]]] = {place: [] for place in PLACES}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("qwen_image", Path(folder) / "qwen", size="tiny")
        for _ in range(options.rounds):
            for place, (is_one, has_core) in PLACES.items():
                with _server(checkpoint, Path(folder) / "log", in_process=is_one) as (url, server):
                    found[place].append(_measure(url, server if has_core else None))
    rows = []
    for place, rounds in found.items():
        alone, beside, taken_s = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratios = sorted(one[1] / one[0] for one in rounds)
        shown = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        rows.append(f"| {place} | {alone * 1000:.2f} | {beside * 1000:.2f} | {shown} | {taken_s:.1f} |")
    lines = [
        f"# A step beside large answers, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.beside --rounds {options.rounds}`. {hardware()}; one engine thread; two cores for the "
        "engine, the server and the clients together.",
        f"{len(ACCEPT)} clients take one answer of about 200 MB each ({', '.join(ACCEPT)}) off plain sockets, a process each. "
        f"Medians of {options.rounds} rounds, servers in turn. With a core free, the engine alone runs on the first core, and "
        "server and clients run on the second.",
        "| the engine is | ms a step alone | ms a step beside | ratio [least, most] | s of reading |\n|---|---|---|---|---|\n"
        + "\n".join(rows),
        "Aim: at most 1.1 where a core is free, 1.3 on two shared cores. Not claimed: the time of an answer; the clients "
        "compete for the same two cores.",
    ]
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def _measure(url: str, server: int | None) -> tuple[float, float, float]:
    """Seconds a step alone, seconds a step beside the readers, and seconds of reading.

    Args:
        url: The address of the server.
        server: Its process, whose engine gets a core to itself; None: all share the cores.
    """
    go = [sys.executable, "-m", "benchmarks.beside", "--read", url]
    readers = [subprocess.Popen([*go, accept], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for accept in ACCEPT]
    if server is not None:
        (engine,) = _children(server)
        for process, core in [(engine, 0), (server, 1), *((reader.pid, 1) for reader in readers)]:
            for thread in os.listdir(f"/proc/{process}/task"):
                os.sched_setaffinity(int(thread), {core})
    for reader in readers:
        assert reader.stdout is not None and reader.stdout.readline().strip() == "ready"
    with httpx.Client(base_url=url, timeout=600.0) as client:
        _step_s(client)
        alone, ended_s = [], time.monotonic() + ALONE_S
        while time.monotonic() < ended_s:
            alone.append(_step_s(client))
        started_s = time.monotonic()
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("go\n")
            reader.stdin.flush()
        beside = []
        while any(reader.poll() is None for reader in readers):
            step_s = _step_s(client)
            if all(reader.poll() is None for reader in readers):
                beside.append(step_s)
        taken_s = time.monotonic() - started_s
    assert all(reader.returncode == 0 for reader in readers) and beside, "the answers were read before an image was made"
    return statistics.median(alone), statistics.median(beside), taken_s


def _step_s(client: httpx.Client) -> float:
    answer = client.post("/rollout/generate", json={**SMALL, "rollout": False})
    answer.raise_for_status()
    return float(answer.json()[0]["inference_time_s"]) / SMALL["num_inference_steps"]


def _children(pid: int) -> list[int]:
    return [int(child) for task in os.listdir(f"/proc/{pid}/task") for child in _words(f"/proc/{pid}/task/{task}/children")]


def _words(path: str) -> list[str]:
    return Path(path).read_text().split()


def _read(url: str, accept: str) -> None:
    """Asks for a large answer, and takes it once it is told to."""
    body = json.dumps({**LARGE, "rollout_return_denoising_env": True, "rollout_return_dit_trajectory": True}).encode()
    address = httpx.URL(url)
    head = (
        f"POST /rollout/generate HTTP/1.1\r\nhost: {address.host}:{address.port}\r\ncontent-type: application/json\r\n"
        f"accept: {accept}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    memory, size = bytearray(2**20), 0
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(15, socket.MSG_WAITALL) == b"HTTP/1.1 200 OK"
        print("ready", flush=True)
        sys.stdin.readline()
        while count := connection.recv_into(memory):
            size += count
    assert size > 150e6


@contextlib.contextmanager
def _server(checkpoint: Path, log: Path, *, in_process: bool) -> Iterator[tuple[str, int]]:
    """The address and the process of a server with one engine thread."""
    serve = [sys.executable, "-m", "flowroll", "serve", str(checkpoint), "--port", "0"]
    if in_process:
        serve = [sys.executable, "-m", "benchmarks.beside", "--serve", str(checkpoint)]
    with log.open("w") as file:
        process = subprocess.Popen(serve, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while (found := re.search(r"(?:listening|running) on (http://[^\s\"]+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait()


def _serve(checkpoint: Path) -> None:
    from flowroll.engine import Engine
    from flowroll.engine.service import EngineService, InProcessEngine
    from flowroll.serving import ServerConfig, create_app

    with Engine(checkpoint, device="cpu") as engine, EngineService(engine, max_queue=16) as service:
        app = create_app(InProcessEngine(service), ServerConfig(model=str(checkpoint)))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, access_log=False))
        server.run()


if __name__ == "__main__":
    main()
