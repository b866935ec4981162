"""A full update of a module of 1 GB on every path, beside a plain copy of the same bytes.

`python -m benchmarks.weights`: a server in a process of its own, a trainer here, both on this machine. The copy, and the plain
reading of the file, go into memory that was used before, which is the hardest peer: an update needs room for a second set.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file
from tests.pickling import flattened, pickled, trainer
from torch import Tensor

from benchmarks.measure import hardware, ratio
from flowroll.client import Client
from flowroll.client.weight_group import WeightGroup
from flowroll.testing import make_checkpoint
from flowroll.types import WeightUpdate

RESULTS = Path(__file__).parent / "results"
# Of the mid-size Z-Image, for 1 GB in float32.
LAYERS = 57
READY_S = 300.0
BUCKET_BYTES = 256 * 2**20


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the transformer")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"weights_cpu_{today:%Y%m}.md"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("z_image", Path(folder) / "z", size="mid", n_layers=options.layers)
        file = next((checkpoint / "transformer").glob("*.safetensors"))
        tensors = load_file(file)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with _server(checkpoint) as url, Client(url) as client, WeightGroup([client], backend="gloo") as group, trainer():
            paths = _paths(client, group, file, tensors)
            rows, times = _measure(paths, options.rounds)
    copies = times["copy"]
    lines = [
        f"# New weights on every path, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.weights --rounds {options.rounds}`. {hardware()}; one thread; {num_bytes / 1e9:.2f} "
        f"GB in {len(tensors)} tensors, float32, the file in the page cache.",
        "Seconds: wall time, median. Paused: as the server reports it, the time in which no request could run. Ratio: medians "
        "of paired ratios to the copy, or, for disk and shared memory, to copy and plain reading together, with their 95 % "
        "intervals.",
        "| path | seconds | GB/s | paused s | ratio |\n|---|---|---|---|---|",
    ]
    read_and_copy = [a + b for a, b in zip(copies, times["read"], strict=True)]
    for name, row in rows.items():
        peer = read_and_copy if name in ("disk", "shared memory") else copies
        seconds = statistics.median(times[name])
        paused = f"{statistics.median(row):.3f}" if row else "-"
        lines[-1] += f"\n| {name} | {seconds:.2f} | {num_bytes / seconds / 1e9:.2f} | {paused} | {ratio(times[name], peer)} |"
    lines.append(
        "Aim: disk and shared memory within 1.5 of the copy plus reading. Not claimed: any figure for a network or a GPU."
    )
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def _paths(
    client: Client, group: WeightGroup, file: Path, tensors: dict[str, Tensor]
) -> dict[str, Callable[[], WeightUpdate | None]]:
    """Every way, and what it is compared with."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    target, page = torch.zeros(total, dtype=torch.uint8), bytearray(file.stat().st_size)
    source = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])

    def copy() -> None:
        target.copy_(source)

    def read() -> None:
        with file.open("rb", buffering=0) as opened:
            opened.readinto(page)

    def shared() -> None:
        # A trainer's bucket is in shared memory already; filling it is not part of the update.
        handles = base64.b64encode(pickled(bucket)).decode()
        payload = {"serialized_named_tensors": [handles], "load_format": "flattened_bucket"}
        answer = client._http.post("/update_weights_from_tensor", json=payload)
        assert answer.json()["is_complete"], answer.text

    def broadcast() -> None:
        group.update_weights(tensors, bucket_bytes=BUCKET_BYTES)

    bucket = flattened(tensors)
    bucket["flattened_tensor"].share_memory_()
    return {
        "copy": copy,
        "read": read,
        "disk": lambda: client.update_weights_from_disk(file),
        "HTTP, buckets": lambda: client.update_weights(tensors, bucket_bytes=BUCKET_BYTES),
        "shared memory": shared,
        "process group, gloo": broadcast,
    }


def _measure(
    paths: dict[str, Callable[[], WeightUpdate | None]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Paused seconds, where they are known, and wall seconds of every path in every round."""
    paused: dict[str, list[float]] = {name: [] for name in paths}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(-1, rounds):
        for name in paths if number % 2 == 0 else reversed(list(paths)):
            started_s = time.perf_counter()
            update = paths[name]()
            seconds = time.perf_counter() - started_s
            if number >= 0:
                times[name].append(seconds)
                if update is not None:
                    paused[name].append(update.paused_s)
    return paused, times


@contextlib.contextmanager
def _server(checkpoint: Path) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [sys.executable, "-m", "flowroll", "serve", str(checkpoint), "--port", "0", "--dtype", "float32"]
    command += ["--weights-root", str(checkpoint), "--allow-pickle-weights"]
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            deadline_s = time.monotonic() + READY_S
            while not (found := re.findall(r"listening on (http://\S+)", Path(log.name).read_text(encoding="utf-8"))):
                assert process.poll() is None and time.monotonic() < deadline_s, Path(log.name).read_text(encoding="utf-8")
                time.sleep(0.1)
            httpx.get(f"{found[0]}/liveness").raise_for_status()
            yield found[0]
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
