"""What Ray Serve's proxy costs beside flowroll's way: `python -m benchmarks.ray_serve` (needs `pip install "ray[serve]"`).

The same bytes are asked of three servers on this machine, in turns, over one connection each:

direct   uvicorn in the process that has the bytes
front    uvicorn in a process that gets them from a Ray actor's memory, as the address of a fleet does
serve    a Ray Serve ingress (FastAPI) behind Serve's proxy, which gets them from the same actor

All three send a body in pieces of 1 MiB. Nothing is denoised: what is measured is the way.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import ray
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from benchmarks.cluster import percentile
from benchmarks.measure import hardware
from flowroll.cluster.parcel import Parcel
from flowroll.examples.server import free_port

SMALL, LARGE = 1024, 200 * 10**6
_PIECE = 2**20


def body_of(tensor: torch.Tensor) -> StreamingResponse:
    """Answers with the bytes of a tensor, in pieces, from where they lie."""
    view = memoryview(tensor.numpy())

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(view), _PIECE):
            # Serve's messages are pickled, so that they cannot be views.
            yield bytes(view[start : start + _PIECE])

    return StreamingResponse(pieces(), headers={"content-length": str(len(view))}, media_type="application/octet-stream")


class Source:
    """Has the bytes, as a replica has an answer."""

    async def take(self, size: int) -> Parcel:
        """Returns so many bytes."""
        return Parcel(torch.zeros(size, dtype=torch.uint8), is_shared=True)


class Front:
    """An HTTP server in an actor's process.

    Args:
        source: The actor that has the bytes; None: they are made here.
    """

    def __init__(self, source: Any) -> None:
        app, self._port = FastAPI(), free_port()

        @app.get("/{size}")
        async def take(size: int) -> StreamingResponse:
            if source is None:
                return body_of(torch.zeros(size, dtype=torch.uint8))
            return body_of(await source.take.remote(size))

        server = uvicorn.Server(uvicorn.Config(app, port=self._port, log_level="warning"))
        threading.Thread(target=server.run, daemon=True).start()

    async def url(self) -> str:
        """Returns the address, once it answers."""
        await asyncio.sleep(2)
        return f"http://127.0.0.1:{self._port}"


def ingress(source: Any) -> Any:
    """Returns a Ray Serve application with an ingress of FastAPI's."""
    app = FastAPI()

    from ray import serve

    @serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
    @serve.ingress(app)
    class Ingress:
        @app.get("/{size}")
        async def take(self, size: int) -> StreamingResponse:
            return body_of(await source.take.remote(size))

    return Ingress.bind()


def measure(clients: dict[str, httpx.Client], size: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each answer, by server; the servers are asked in turns."""
    found: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(-3, rounds):
        for name, client in clients.items():
            start_s = time.perf_counter()
            with client.stream("GET", f"/{size}") as answer:
                total = sum(map(len, answer.iter_raw()))
            assert total == size, (name, total)
            if number >= 0:
                found[name].append(time.perf_counter() - start_s)
    return found


def main() -> None:
    """Measures, and prints a table."""
    from ray import serve  # of another extra than this project's

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="small answers of each server")
    parser.add_argument("--rounds", type=int, default=15, help="large answers of each server")
    parser.add_argument("--out", type=Path, default=None, help="the report's file")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    port = free_port()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 2**30)
    try:
        source = ray.remote(Source).options(num_cpus=0).remote()
        fronts = {name: ray.remote(Front).options(num_cpus=0).remote(of) for name, of in (("direct", None), ("front", source))}
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ingress(source), route_prefix="/")
        urls = {name: ray.get(one.url.remote()) for name, one in fronts.items()} | {"serve": f"http://127.0.0.1:{port}"}
        clients = {name: httpx.Client(base_url=url, timeout=120) for name, url in urls.items()}
        times = {size: measure(clients, size, count) for size, count in ((SMALL, options.requests), (LARGE, options.rounds))}
        serve.shutdown()
    finally:
        ray.shutdown()
    command = f"python -m benchmarks.ray_serve {' '.join(sys.argv[1:])}".strip()
    date = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"# Ray Serve's proxy beside a direct connection, {date}",
        f"`{command}` on {hardware()}; ray {ray.__version__}; load average {os.getloadavg()[0]:.1f} at the end.",
        "",
        "| | direct | front (flowroll's way) | Ray Serve |",
        "|---|---|---|---|",
    ]
    for size, name in ((SMALL, "1 KB"), (LARGE, "200 MB")):
        for share in (0.5, 0.99):
            cells = " | ".join(f"{1000 * percentile(times[size][one], share):.1f} ms" for one in times[size])
            lines.append(f"| {name}, p{100 * share:g} | {cells} |")
    large = times[LARGE]
    lines += ["", f"200 MB, Ray Serve beside the front: {median(large['serve']) / median(large['front']):.2f} times as long."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
