"""The public doors of flowroll as the proofs use them: an engine in this process, or a server and its client."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import torch
from tests.factories import assert_same_answer
from tests.proofs.cases import Request

from flowroll import Rollout
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import Limits
from flowroll.engine.outline import check_layout, outline_model
from flowroll.errors import InvalidRequestError
from flowroll.exact import use_exact_kernels
from flowroll.parallel.linears import check_columns
from flowroll.parallel.shards import check_rows
from flowroll.types import Layout

WAIT_S = 120.0
# What a rollout says about the run rather than about the sample.
_OF_THE_RUN: dict[str, Any] = {
    "request_id": "",
    "inference_time_s": 0.0,
    "peak_memory_mb": 0.0,
    "first_step": None,
    "last_step": None,
}
_OF_THE_ENGINE: dict[str, Any] = {"layout": "", "strategy": "", "versions": {}, "weights_sha256": None}


class Door(Protocol):
    """What answers requests: `flowroll.engine.Engine` or `flowroll.client.Client`."""

    def rollout(self, **fields: Any) -> list[Rollout]:
        """One rollout per sample."""


def skip_where_refused(checkpoint: Path, *, dtype: str, device: str, layout: Layout) -> None:
    """Skips a test whose engine refuses its layout for the bits of this machine's kernels, by the engine's own check.

    A degree that does not fit the model is a fault of the table, and no reason to skip.
    """
    place, limits = torch.device(device), Limits()
    use_exact_kernels(place)
    outline = outline_model(examine_checkpoint(checkpoint, variant=None), device=place, dtype=getattr(torch, dtype))
    check_columns(outline.transformer, outline.family.parallel_plan.columns, layout.tp)
    check_rows(layout.sp, limits.max_pixels // outline.spec.pixel_unit**2)
    try:
        check_layout(outline, layout, limits)
    except InvalidRequestError as refusal:
        pytest.skip(refusal.message)


def together(door: Door, requests: Sequence[Request]) -> list[list[Rollout]]:
    """The answers to requests that are all in flight at once."""
    start = threading.Barrier(len(requests))

    def send(request: Request) -> list[Rollout]:
        # A thread does not inherit the thread count, which is part of the bits.
        torch.set_num_threads(1)
        start.wait(WAIT_S)
        return door.rollout(**request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def one_by_one(door: Door, request: Request) -> list[Rollout]:
    """The samples of a request, each asked for by itself, one after the other."""
    fields = {name: value for name, value in request.items() if name not in ("seed", "seeds", "num_outputs_per_prompt")}
    return [door.rollout(**fields, seed=seed)[0] for seed in seeds_of(request)]


def seeds_of(request: Request) -> list[int]:
    """The seed of every sample of a request."""
    return list(request.get("seeds") or (request["seed"] + index for index in range(request.get("num_outputs_per_prompt", 1))))


def assert_same_samples(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    """Every field of every sample is the same: tensors in their dtype and every bit, and the record of how it was made."""
    for left, right in zip(found, expected, strict=True):
        assert_same_answer(_of_the_sample(left), _of_the_sample(right), "rollout")


def _of_the_sample(rollout: Rollout) -> Rollout:
    assert rollout.provenance is not None
    proof = dataclasses.replace(rollout.provenance, **_OF_THE_ENGINE)
    return dataclasses.replace(rollout, **_OF_THE_RUN, provenance=proof)


@contextmanager
def served(checkpoint: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of `flowroll serve CHECKPOINT FLAGS...`, one thread a rank; the server is gone when the block ends."""
    command = [sys.executable, "-m", "flowroll", "serve", str(checkpoint), "--port", "0", *flags]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + WAIT_S
    while (found := re.search(r"listening on (http://[^\s\"]+)", log.read_text())) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[1]


def num_shared_steps(address: str) -> int:
    """Forwards that a server has run for more than one sample."""
    buckets = re.findall(r'^flowroll_batch_samples_bucket\{le="([^"]+)"\} (\S+)', _metrics(address), re.M)
    counts = {float(bound): float(count) for bound, count in buckets}
    return round(counts[math.inf] - counts[1.0]) if counts[math.inf] else 0


def num_steps(address: str) -> int:
    """Steps that a server has taken, of all samples."""
    [count] = re.findall(r"^flowroll_steps_total (\S+)", _metrics(address), re.M)
    return round(float(count))


def _metrics(address: str) -> str:
    return httpx.get(f"{address}/metrics", timeout=WAIT_S).text
