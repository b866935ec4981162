"""Three times as many requests as the server can do, from clients that come when it suits them and return when they are told.

`python -m benchmarks.overload --minutes 10`: first the capacity, with as many callers as the server takes at once; then an open
loop of that many times it, whose refused clients come back after Retry-After; then no new ones, until every client was served;
then the capacity again, because a shared machine is not the same all along; the larger one counts. Goodput must stay near
capacity, and whoever was accepted must not wait longer than the queue takes.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import hardware
from flowroll.examples.server import exit_on_sigterm, running_server
from flowroll.loadgen import Load, Mix, run_load
from flowroll.loadgen.report import OK, LoadReport, Outcome
from flowroll.testing import make_checkpoint

RESULTS = Path(__file__).parent / "results"
QUEUE = 16
# So few samples at once that the capacity is the model's, and not that of the callers' process beside it.
RUNNING = 4
MIX = Mix(
    prompts=("a red fox", "a bowl of pears"),
    sizes=((128, 128),),
    steps=(20,),
    group_sizes=(1,),
    dynamics=("sde",),
    fixed={"rollout_debug_mode": False},
)
_MOST_IN_FLIGHT = 100_000
_RETRIES = 10_000
_MIN_GOODPUT = 0.9


@dataclass(slots=True)
class Watched:
    """When requests ended, and how.

    Attributes:
        ends: Moments, in monotonic seconds, with what ended.
    """

    ends: list[tuple[float, Outcome]] = field(default_factory=list)

    def note(self, outcome: Outcome) -> None:
        """Notes an end."""
        self.ends.append((time.monotonic(), outcome))

    def completed(self, start_s: float, end_s: float) -> list[Outcome]:
        """What was completed between these moments."""
        return [outcome for moment_s, outcome in self.ends if start_s <= moment_s < end_s and outcome.code == OK]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overloaded:
    """What was measured.

    Attributes:
        capacities: Requests a second with as many callers as the server takes at once, before the overload and after it.
        goodput: Requests a second that were completed while new clients came.
        waits_s: Seconds from acceptance to the answer, of all that were completed under overload.
        report: The report of all clients of the open loop.
        rest_s: Seconds from the last new client to the last answer.
    """

    capacities: tuple[float, float]
    goodput: float
    waits_s: Sequence[float]
    report: LoadReport
    rest_s: float

    @property
    def capacity(self) -> float:
        """The larger one: what other work takes on a shared machine must not make a promise easier to keep."""
        return max(self.capacities)

    @property
    def bound_s(self) -> float:
        """Seconds that an accepted request may take: all that may be in front of it, and itself, at the measured capacity."""
        return (QUEUE + 2 * RUNNING + 1) / self.capacity

    @property
    def promises(self) -> dict[str, tuple[bool, str]]:
        """What must hold, whether it does, and the figures."""
        share, wait_s = self.goodput / self.capacity, percentile(self.waits_s, 99)
        unserved = self.report.sent - self.report.completed
        return {
            f"goodput >= {_MIN_GOODPUT:.0%} of capacity": (share >= _MIN_GOODPUT, f"{share:.1%}"),
            "p99 of accepted requests within twice the queue": (wait_s <= 2 * self.bound_s, f"{wait_s:.1f} s"),
            "every client served in the end": (unserved == 0, f"{unserved} of {self.report.sent} were not"),
        }


def main() -> None:
    """Measures and prints or writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--factor", type=float, default=3.0, help="arrivals by capacity")
    parser.add_argument("--capacity-s", type=float, default=20.0, help="seconds for which the capacity is measured")
    parser.add_argument("--family", default="z_image")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    exit_on_sigterm()
    measured = asyncio.run(overload(options))
    today = datetime.datetime.now(datetime.UTC)
    text = page(measured, options, f"{today:%Y-%m-%d}")
    (options.out or RESULTS / f"overload_cpu_{today:%Y%m}.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(0 if all(is_kept for is_kept, _ in measured.promises.values()) else 1)


async def overload(options: argparse.Namespace) -> Overloaded:
    """Runs the server and both loads."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(options.family, Path(folder) / "model")
        flags = ("--device", "cpu", "--max-queue", str(QUEUE), "--max-running-samples", str(RUNNING))
        with running_server(checkpoint, Path(folder) / "log", *flags, "--max-connections", str(_MOST_IN_FLIGHT)) as server:
            # As many as run and wait: more callers would only be refused.
            closed = Load(concurrency=QUEUE, duration_s=options.capacity_s, warmup=2)
            capacity = (await run_load(server.url, MIX, closed)).per_second["requests"]
            watched, began_s = Watched(), time.monotonic()
            seconds = 60 * options.minutes
            opened = Load(rate=options.factor * capacity, duration_s=seconds, retries=_RETRIES, max_in_flight=_MOST_IN_FLIGHT)
            report = await run_load(server.url, MIX, opened, on_outcome=watched.note)
            ended_s = time.monotonic()
            capacity_after = (await run_load(server.url, MIX, closed)).per_second["requests"]
    # The first requests find an empty queue, which is no overload yet.
    settled_s = min(QUEUE / capacity, seconds / 4)
    under_load = watched.completed(began_s + settled_s, began_s + seconds)
    return Overloaded(
        capacities=(capacity, capacity_after),
        goodput=len(under_load) / (seconds - settled_s),
        waits_s=[sum(outcome.stages.values()) for outcome in under_load],
        report=report,
        rest_s=ended_s - began_s - seconds,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed; infinity of none."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else math.inf


def page(measured: Overloaded, options: argparse.Namespace, day: str) -> str:
    """The result as Markdown."""
    report, rows = measured.report, measured.promises.items()
    return "\n".join(
        [
            f"# Overload, {day}",
            "",
            f"Command: `python -m benchmarks.overload {' '.join(sys.argv[1:])}`. {hardware()}; {os.cpu_count()} cores, shared, "
            f"load {os.getloadavg()[0]:.1f}. A tiny {options.family}, 128 x 128, 20 steps, `--max-queue {QUEUE} "
            f"--max-running-samples {RUNNING}`; the clients are on the same machine.",
            "",
            "| promise | kept | figure |",
            "|---|---|---|",
            *(f"| {name} | {'yes' if is_kept else '**no**'} | {shown} |" for name, (is_kept, shown) in rows),
            "",
            f"- Capacity {measured.capacities[0]:.2f} requests/s before and {measured.capacities[1]:.2f} after; "
            f"{options.factor:g} times the first for {options.minutes:g} min: "
            f"{report.sent} clients, goodput {measured.goodput:.2f} requests/s.",
            f"- From acceptance to the answer: median {percentile(measured.waits_s, 50):.1f} s, p99 "
            f"{percentile(measured.waits_s, 99):.1f} s; the queue and what runs take {measured.bound_s:.1f} s at capacity.",
            f"- Refusals: {report.rejections}, {report.rejections / max(report.sent, 1):.1f} a client. From a client's first "
            f"try to its answer: median {report.latency_s.get('p50', math.inf):.0f} s, most "
            f"{report.latency_s.get('max', math.inf):.0f} s. The last was served {measured.rest_s:.0f} s after the last came.",
            f"- Errors: {report.errors or 'none'}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
