"""What a fleet costs and brings, beside one server: `python -m benchmarks.cluster`.

Three questions, each asked of a server (`flowroll serve`) and of a fleet on this machine, in turns: how long a small request
takes (the way over Ray), how long a large answer takes, and how much more two replicas do than one. Replicas have one CPU
thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import hardware
from flowroll import Client
from flowroll.checkpoints import shapes_checkpoint
from flowroll.examples.server import exit_on_sigterm, running_server
from flowroll.wire.codec import MSGPACK
from flowroll.wire.names import ROLLOUT_ROUTE

RESULTS = Path(__file__).parent / "results"
MODEL = shapes_checkpoint("z_image")
SMALL: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 1, "guidance_scale": 0}
# 64 pictures of 512 x 512 in float32: 192 MiB.
LARGE: dict[str, Any] = {**SMALL, "num_outputs_per_prompt": 64, "width": 512, "height": 512, "rollout_debug_mode": False}
GROUP: dict[str, Any] = {"prompt": "a red circle", "num_outputs_per_prompt": 8, "num_inference_steps": 20, "guidance_scale": 0}


@contextlib.contextmanager
def serving(*options: str, command: str = "serve") -> Iterator[Client]:
    """A client of a server, or of a fleet, in a process of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(MODEL, Path(folder) / "log", "--device", "cpu", *options, command=command) as server,
        Client(server.url) as client,
    ):
        yield client


def fleet(replicas: int) -> contextlib.AbstractContextManager[Client]:
    """A client of a fleet."""
    return serving("--replicas", str(replicas), "--threads", "1", command="cluster")


def seconds(call: Callable[[], object]) -> float:
    """Measures one call."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def percentile(values: list[float], share: float) -> float:
    """Returns the value that this share of all values does not exceed."""
    return sorted(values)[min(round(share * len(values)), len(values) - 1)]


def latencies(one: Client, other: Client, count: int) -> tuple[list[float], list[float]]:
    """Measures small requests at both, in turns."""
    for client in (one, other) * 5:
        client.rollout(**SMALL)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(count):
        for client, values in zip((one, other), found, strict=True):
            values.append(1000 * seconds(lambda client=client: client.rollout(**SMALL)))  # type: ignore[misc]
    return found


def large_answers(one: Client, other: Client, rounds: int) -> tuple[float, list[float], list[float]]:
    """Measures large answers beyond the time of their denoising, which the answer's header tells, in turns."""
    found: tuple[list[float], list[float]] = ([], [])
    megabytes = 0.0
    for _ in range(rounds):
        for client, values in zip((one, other), found, strict=True):
            start_s = time.perf_counter()
            response = client._http.post(ROLLOUT_ROUTE, json=LARGE, headers={"accept": MSGPACK}, timeout=600)
            total_s = time.perf_counter() - start_s
            stages = dict(one.split(";dur=") for one in response.headers["x-flowroll-timing"].split(", "))
            worked_s = sum(float(stages[name]) for name in ("queue", "encode", "denoise", "decode")) / 1000
            values.append(total_s - worked_s)
            megabytes = len(response.content) / 2**20
    return megabytes, *found


def throughput(client: Client, seconds_: float, callers: int) -> float:
    """Measures image-steps a second with so many callers."""
    ended, count, lock = threading.Event(), [0], threading.Lock()

    def ask(number: int) -> None:
        seed = 10_000 * number
        while not ended.is_set():
            client.rollout(**GROUP, seed=seed)
            seed += 8
            with lock:
                count[0] += GROUP["num_outputs_per_prompt"] * GROUP["num_inference_steps"]

    with ThreadPoolExecutor(callers) as pool:
        for number in range(callers):
            pool.submit(ask, number)
        time.sleep(2.0)
        before, start_s = count[0], time.perf_counter()
        time.sleep(seconds_)
        done, taken_s = count[0] - before, time.perf_counter() - start_s
        ended.set()
    return done / taken_s


def report(options: argparse.Namespace) -> str:
    """Measures everything, and returns the report."""
    with serving() as one, fleet(1) as other:
        direct, routed = latencies(one, other, options.requests)
        print(f"small requests: {median(direct):.1f} and {median(routed):.1f} ms", flush=True)
        megabytes, sent, routed_sent = large_answers(one, other, options.rounds)
    print(f"large answers: {sent} and {routed_sent} s", flush=True)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for replicas in rates:
            with fleet(replicas) as client:
                rates[replicas].append(throughput(client, options.seconds, 6))
            print(f"{replicas} replicas: {rates[replicas][-1]:.0f} image-steps/s", flush=True)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    command = f"python -m benchmarks.cluster {' '.join(sys.argv[1:])}".strip()
    date = datetime.datetime.now(datetime.UTC).date()
    return f"""# A fleet beside one server, {date}
`{command}` on {hardware()}, shared with other work; load average {os.getloadavg()[0]:.1f} at the end. Replicas have one
thread each; the model is `shapes-z_image`.

| | one server | fleet of one replica |
|---|---|---|
| a request of one step, p50 | {percentile(direct, 0.5):.1f} ms | {percentile(routed, 0.5):.1f} ms |
| a request of one step, p99 | {percentile(direct, 0.99):.1f} ms | {percentile(routed, 0.99):.1f} ms |
| an answer of {megabytes:.0f} MiB, beyond its pictures, median | {median(sent):.2f} s | {median(routed_sent):.2f} s |

Two replicas beside one, 6 callers, groups of 8 samples of 20 steps: {", ".join(f"{rate:.0f}" for rate in rates[2])} against
{", ".join(f"{rate:.0f}" for rate in rates[1])} image-steps/s, a ratio of {median(ratios):.2f}.

Not claimed: anything about GPUs, several machines, or machines that do nothing else.
"""


def main() -> None:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="how often one replica and two are compared")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=None, help="the report's file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exit_on_sigterm()
    text = report(options)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
