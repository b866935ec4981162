"""Whether a server stays responsive while it sends large answers: /health from outside, the event loop from inside.

`python -m benchmarks.responsive`: a real server in this process, its event loop with a heartbeat beside it; in another process
several clients that ask for answers of about 200 MB in both formats, and one that asks for /health all the time. What counts is
the time in which bytes of large answers were made and sent; the generation before it is in the figures too.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from benchmarks.measure import hardware
from flowroll.engine import Engine
from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.serving.app import create_app
from flowroll.serving.config import ServerConfig
from flowroll.testing import make_checkpoint

RESULTS = Path(__file__).parent / "results"
CLIENTS = ("application/msgpack", "application/json", "application/msgpack")
# 48 steps of 1 MiB latents, four tensors of them a step: 200 MB.
REQUEST = {
    "prompt": "a photo of two wine glasses",
    "width": 1024,
    "height": 1024,
    "num_inference_steps": 48,
    "guidance_scale": 0.0,
    "rollout_return_denoising_env": True,
    "rollout_return_dit_trajectory": True,
}
BEAT_S = 0.002
PROBE_S = 0.02


def main() -> None:
    """Measures; with --drive it is the process of the clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="answers of each client")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    parser.add_argument("--drive", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        print(json.dumps(_drive(options.drive, options.rounds)))
        return
    torch.set_num_threads(1)
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"responsive_cpu_{today:%Y%m}.md"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("qwen_image", Path(folder) / "qwen", size="tiny")
        with Engine(checkpoint, dtype="float32", device="cpu") as engine:
            service = EngineService(engine, max_queue=16)
            measured, gaps = asyncio.run(_serve(service, options.rounds))
            service.close()
    health = sorted(measured["health_s"])
    lines = [
        f"# Responsiveness under large answers, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.responsive --rounds {options.rounds}`. {hardware()}; two cores for server, clients "
        "and probe together.",
        f"{len(CLIENTS)} clients at once, {options.rounds} answers each, {measured['bytes'] / measured['answers'] / 1e6:.0f} "
        f"MB an answer on average, {measured['transfer_s']:.1f} s of bytes in all; {len(health)} probes of /health. The "
        "clients only count what they receive.",
        "| what | median ms | p99 ms | largest ms | aim |\n|---|---|---|---|---|\n"
        f"| GET /health from another process | {_row(health)} | p99 <= 100 |\n"
        f"| event loop late by | {_row(sorted(gaps))} | largest <= 50 |",
        "Not claimed: that a machine whose cores are all busy with generation schedules the server in time.",
    ]
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def _row(values: Sequence[float]) -> str:
    p99 = values[min(int(0.99 * len(values)), len(values) - 1)]
    return " | ".join(f"{seconds * 1000:.1f}" for seconds in (statistics.median(values), p99, values[-1]))


async def _serve(service: EngineService, rounds: int) -> tuple[dict[str, Any], list[float]]:
    """Runs the server until the clients are done; returns what they measured, and how late each heartbeat was."""
    app = create_app(InProcessEngine(service), ServerConfig(model="tiny"))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    gaps: list[float] = []
    beating = asyncio.create_task(_beat(gaps))
    command = [sys.executable, "-m", "benchmarks.responsive", "--drive", f"http://127.0.0.1:{port}", "--rounds", str(rounds)]
    answer = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    beating.cancel()
    server.should_exit = True
    await serving
    measured: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return measured, gaps


async def _beat(gaps: list[float]) -> None:
    while True:
        started_s = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        gaps.append(time.perf_counter() - started_s - BEAT_S)


def _drive(url: str, rounds: int) -> dict[str, Any]:
    """The clients and the probe."""
    ended = threading.Event()
    health: list[float] = []
    sizes: list[int] = []
    seconds: list[float] = []

    def ask(media_type: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=600.0) as client:
            for turn in range(rounds):
                body = {**REQUEST, "seed": 100 * number + turn}
                with client.stream("POST", "/rollout/generate", json=body, headers={"accept": media_type}) as response:
                    response.raise_for_status()
                    started_s = time.perf_counter()
                    sizes.append(sum(len(chunk) for chunk in response.iter_raw()))
                    seconds.append(time.perf_counter() - started_s)

    def probe() -> None:
        with httpx.Client(base_url=url, timeout=60.0) as client:
            while not ended.wait(PROBE_S):
                started_s = time.perf_counter()
                client.get("/health").raise_for_status()
                health.append(time.perf_counter() - started_s)

    threads = [threading.Thread(target=ask, args=(kind, number)) for number, kind in enumerate(CLIENTS)]
    probing = threading.Thread(target=probe)
    for thread in [probing, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    probing.join()
    assert len(sizes) == rounds * len(CLIENTS)
    return {"health_s": health, "bytes": sum(sizes), "answers": len(sizes), "transfer_s": sum(seconds)}


if __name__ == "__main__":
    main()
