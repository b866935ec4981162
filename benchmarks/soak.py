"""Half an hour of mixed traffic, well behaved and not, against real `flowroll serve` processes; every promise must hold.

`python -m benchmarks.soak`: random requests from clients that wait, abort, leave, read slowly, crowd or ask for nonsense, and
from some that mean harm, with deadlines, pauses and weight updates. All along a random share of the finished samples is
compared, every tensor bit for bit, with the same request run alone. Exit status 1 when a promise is broken. Linux alone: it
reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.measure import hardware
from benchmarks.soaking.asks import MAX_BODY_BYTES, MAX_RUNNING_SAMPLES, MAX_UNSENT_BYTES
from benchmarks.soaking.books import Books, ServerCounts
from benchmarks.soaking.truth import Truth
from benchmarks.soaking.verdict import Soaked, chart, section
from benchmarks.soaking.visits import Visitor, http_client
from benchmarks.soaking.watch import Holding, holding
from flowroll.examples.server import Server, exit_on_sigterm, running_server
from flowroll.families import FAMILIES as REGISTERED
from flowroll.testing import make_checkpoint

RESULTS = Path(__file__).parent / "results"
# Those that draw from text alone.
FAMILIES = tuple(name for name, family in REGISTERED.items() if not family.conditioning.in_place("image_kwargs"))
# Small enough that queue and memory limits are met.
SERVER_OPTIONS = (
    *("--max-queue", "8", "--max-running-samples", str(MAX_RUNNING_SAMPLES), "--max-body-bytes", str(MAX_BODY_BYTES)),
    *("--max-unsent-bytes", str(MAX_UNSENT_BYTES), "--send-timeout-s", "3", "--min-send-bytes-per-s", str(2**20)),
)
# glibc keeps much of what is freed, in heaps that splinter under tensors of many sizes, and oneDNN and torch keep kernels of
# the last 1,024 shapes: resident memory then tells of them, not of the server. So set, what is freed goes back, and the
# caches of kernels are full before memory is judged.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
_WATCH_S = 2.0
_QUIET_S = 4.0
_REST_LIMIT_S = 60.0
_STRETCH_S = 100.0


@dataclass(slots=True, kw_only=True)
class Subject:
    """One server under test.

    Attributes:
        family: What it serves.
        server: Its process.
        log: Its log.
        truth: What its answers must be.
        folders: Weights it may be given, by the letter of their version.
        books: The books of its clients.
        watched: What it held.
    """

    family: str
    server: Server
    log: Path
    truth: Truth
    folders: dict[str, Path]
    books: Books = field(default_factory=Books)
    watched: list[Holding] = field(default_factory=list)


def main() -> None:
    """Soaks and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=None, help="minutes before memory is judged; a sixth of the time")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="one server each, side by side")
    parser.add_argument("--clients", type=int, default=2, help="of each server, beside those of a crowd")
    parser.add_argument("--check-share", type=float, default=0.15, help="share of the answers that are compared")
    parser.add_argument("--no-updates", action="store_true", help="leave the weights as they are")
    parser.add_argument("--most-kib-per-minute", type=float, default=100.0, help="upper bound of a flat slope of memory")
    parser.add_argument("--no-fill", action="store_true", help="let what a server remembers of forwards come as it comes")
    parser.add_argument(
        "--keep-allocator", action="store_true", help="leave the servers' allocator and cache of kernels as they are"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="result file; a chart is put beside it")
    options = parser.parse_args()
    exit_on_sigterm()
    # Read by a process at its start: of the servers.
    os.environ.update({} if options.keep_allocator else ALLOCATOR)
    allocator = "glibc's defaults" if options.keep_allocator else " ".join(f"{key}={value}" for key, value in ALLOCATOR.items())
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"soak_cpu_{today:%Y%m}.md"
    soaked = asyncio.run(soak(options))
    verdicts = [(each, each.promises(options.most_kib_per_minute)) for each in soaked]
    chart(soaked, out.with_suffix(".png"))
    sections = [
        f"# Soak, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.soak {' '.join(sys.argv[1:])}`. {hardware()}; {os.cpu_count()} cores, shared. Tiny "
        f"checkpoints, `flowroll serve {' '.join(SERVER_OPTIONS)}` with one thread each, {options.clients} clients a server; "
        f"allocator of the servers: {allocator}.",
        "What a server holds is judged at rest, with nothing to do, after the warm-up and then every 100 s: "
        f"{'' if options.no_fill else 'what it remembers of shared forwards is at its bound before, and '}under load it "
        "tells of the load, which other work moves. Slopes are per minute, by least squares, with their 95 % "
        "intervals; what is flat does not rise beyond chance, or for memory by less than the bound. Not claimed: throughput, "
        "anything about a GPU or about real sizes.",
        f"![memory and file descriptors]({out.with_suffix('.png').name})",
        *(section(*verdict) for verdict in verdicts),
    ]
    out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))
    sys.exit(0 if all(promise.is_kept for _, promises in verdicts for promise in promises) else 1)


async def soak(options: argparse.Namespace) -> list[Soaked]:
    """Runs the servers side by side."""
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            subjects = []
            for family in options.families:
                folders = checkpoints(family, Path(folder))
                log = Path(folder) / f"{family}.log"
                flags = (*SERVER_OPTIONS, "--device", "cpu", "--weights-root", folder)
                server = stack.enter_context(running_server(folders["0"], log, *flags))
                truth = Truth(folders)
                stack.callback(truth.close)
                subjects.append(Subject(family=family, server=server, log=log, truth=truth, folders=folders))
            return await asyncio.gather(*(soak_one(subject, options) for subject in subjects))


def checkpoints(family: str, folder: Path) -> dict[str, Path]:
    """Two checkpoints that differ in their transformer alone, by the first letter of their versions."""
    first = make_checkpoint(family, folder / f"{family}-0")
    other = make_checkpoint(family, folder / f"{family}-1", seed=1)
    second = shutil.copytree(first, folder / f"{family}-b")
    shutil.rmtree(second / "transformer")
    shutil.copytree(other / "transformer", second / "transformer")
    return {"0": first, "b": second}


async def soak_one(subject: Subject, options: argparse.Namespace) -> Soaked:
    """Fills caches; traffic to warm up; then stretches of traffic, a rest after each, which shows what the server holds."""
    began_s, pid = time.monotonic(), subject.server.pid
    warm_up = options.minutes / 6 if options.warm_up is None else options.warm_up

    async def watch() -> None:
        while True:
            subject.watched.append(holding(pid, began_s))
            await asyncio.sleep(_WATCH_S)

    watching = asyncio.create_task(watch())
    if not options.no_fill:
        async with http_client(subject.server.url) as http:
            await visitor_of(subject, options, http, random.Random(f"{options.seed} fill")).fill_caches()
    # The minutes are those of traffic: on a busy machine filling the caches may take as long.
    end_s = time.monotonic() + 60 * options.minutes
    await traffic(subject, options, 60 * warm_up, f"{options.seed} warm-up")
    counts = await rest(subject)
    rests = [holding(pid, began_s)]
    while (left_s := end_s - time.monotonic()) > 0:
        await traffic(subject, options, min(left_s, _STRETCH_S), f"{options.seed} {len(rests)}")
        counts = await rest(subject)
        rests.append(holding(pid, began_s))
    watching.cancel()
    return Soaked(
        family=subject.family,
        books=subject.books,
        counts=counts,
        watched=subject.watched,
        rests=rests,
        errors=[line for line in subject.log.read_text().splitlines() if "ERROR" in line or "Traceback" in line],
    )


async def traffic(subject: Subject, options: argparse.Namespace, seconds: float, seed: str) -> None:
    """Clients and an operator, for so long."""
    end_s = time.monotonic() + seconds
    async with http_client(subject.server.url) as http:

        async def client(number: int) -> None:
            source = random.Random(f"{seed} {subject.family} {number}")
            visitor = visitor_of(subject, options, http, source)
            while time.monotonic() < end_s:
                await visitor.visit()
                await asyncio.sleep(source.uniform(0.0, 0.2))

        operator = operate(subject, http, random.Random(f"{seed} {subject.family}"), end_s, not options.no_updates)
        await asyncio.gather(operator, *(client(number) for number in range(options.clients)))


def visitor_of(subject: Subject, options: argparse.Namespace, http: httpx.AsyncClient, source: random.Random) -> Visitor:
    """A client of the server, with these connections and chances."""
    return Visitor(
        http=http,
        url=httpx.URL(subject.server.url),
        source=source,
        books=subject.books,
        truth=subject.truth,
        check_share=options.check_share,
    )


async def operate(subject: Subject, http: httpx.AsyncClient, source: random.Random, end_s: float, updates: bool) -> None:
    """Pauses generation, or exchanges weights, every now and then."""
    books = subject.books
    while (remaining_s := end_s - time.monotonic()) > 0:
        await asyncio.sleep(min(source.uniform(3.0, 12.0), remaining_s))
        if updates and source.random() < 0.5:
            letter = source.choice(list(subject.folders))
            version = f"{letter}-{books.updates + 1}"
            sent = {"model_path": str(subject.folders[letter]), "module": "transformer", "weight_version": version}
            answers = [await http.post("/update_weights_from_disk", json=sent)]
            books.updates += 1
        else:
            answers = [await http.post("/pause_generation", json={"mode": source.choice(("finish", "freeze"))})]
            await asyncio.sleep(source.uniform(0.1, 1.0))
            answers.append(await http.post("/continue_generation", json={}))
            books.pauses += 1
        books.wrong += [f"an operator got {each.status_code} {each.text[:200]}" for each in answers if each.status_code != 200]


async def rest(subject: Subject) -> ServerCounts:
    """Waits until the server has nothing to do and its connections are closed."""
    deadline_s = time.monotonic() + _REST_LIMIT_S
    while True:
        async with http_client(subject.server.url) as http:
            counts = ServerCounts.read((await http.get("/metrics")).text)
        # The server closes its side of what the clients have left, and lets go of threads that it lent out.
        await asyncio.sleep(_QUIET_S)
        if not (counts.unfinished or counts.running_samples) or time.monotonic() > deadline_s:
            return counts


if __name__ == "__main__":
    main()
