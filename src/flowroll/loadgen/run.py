"""Sends a load to a server and notes how every request ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from flowroll.client import AsyncClient
from flowroll.errors import ServerConnectionError
from flowroll.loadgen.measuring import MeasuringTransport
from flowroll.loadgen.plan import Load, Mix, arrivals
from flowroll.loadgen.report import OK, REJECTED, LoadReport, Outcome, summarize
from flowroll.types import Number
from flowroll.wire.codec import WireFormat


async def run_load(
    url: str,
    mix: Mix,
    load: Load,
    *,
    api_key: str | None = None,
    wire_format: WireFormat = "json",
    timeout_s: Number = 600.0,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> LoadReport:
    """Sends a load to a server and waits for every answer. It connects directly, never through a proxy.

    Args:
        url: The server's URL, e.g. "http://127.0.0.1:30000".
        mix: What is sent.
        load: When it is sent.
        api_key: The server's bearer token, if it demands one.
        wire_format: Format of the answers: "json", which every server with the API has, or "msgpack".
        timeout_s: Longest silence of the server in seconds.
        on_outcome: Called whenever a request has ended.

    Raises:
        ServerConnectionError: A request of the warm-up failed, other than by 429.
        InvalidRequestError: The URL or the key cannot be used in HTTP.
    """
    transport = MeasuringTransport()
    options: dict[str, Any] = {"api_key": api_key, "wire_format": wire_format, "timeout_s": timeout_s}
    async with AsyncClient(url, **options, transport=transport) as client:
        run = _Run(client, transport, load, on_outcome)
        # Other requests of the same kind, so that the warm-up does not change what is measured.
        await run.warm_up(islice(mix.requests(seed=~mix.seed), load.warmup), url)
        planned = islice(mix.requests(), load.num_requests)
        started_s = time.monotonic()
        end_s = started_s + (load.duration_s or float("inf"))
        if load.rate is None:
            await run.closed_loop(planned, end_s)
        else:
            await run.open_loop(planned, (started_s + offset_s for offset_s in arrivals(load.rate, mix.seed)), end_s)
        return summarize(run.outcomes, time.monotonic() - started_s)


class _Run:
    """What was sent and how it ended."""

    def __init__(
        self, client: AsyncClient, transport: MeasuringTransport, load: Load, on_outcome: Callable[[Outcome], None]
    ) -> None:
        self._client, self._transport, self._load, self._on_outcome = client, transport, load, on_outcome
        self._in_flight = 0
        self.outcomes: list[Outcome] = []

    async def warm_up(self, planned: Iterator[dict[str, Any]], url: str) -> None:
        """Sends requests one at a time that are not counted."""
        for values in planned:
            await self._send_once(values, outcome := Outcome())
            if outcome.code != OK and outcome.status != REJECTED:
                shown = f"{outcome.status or 'no answer'} {outcome.code}"
                raise ServerConnectionError(
                    f"the server at {url} must answer the warm-up, got {shown}; check the URL and the requests."
                )
            await asyncio.sleep(outcome.retry_after_s)

    async def open_loop(self, planned: Iterator[dict[str, Any]], dues_s: Iterator[float], end_s: float) -> None:
        """Sends every request when it is due, whatever became of the others."""
        async with asyncio.TaskGroup() as tasks:
            for values, due_s in zip(planned, dues_s, strict=False):
                if due_s >= end_s:
                    return
                await asyncio.sleep(due_s - time.monotonic())
                if self._in_flight < self._load.max_in_flight:
                    # Counted here, because the task itself begins later.
                    self._in_flight += 1
                    tasks.create_task(self._send(values, due_s))
                else:
                    self._note(Outcome(code="not_sent"))

    async def closed_loop(self, planned: Iterator[dict[str, Any]], end_s: float) -> None:
        """Keeps so many requests in flight."""

        async def caller() -> None:
            while time.monotonic() < end_s and (values := next(planned, None)) is not None:
                self._in_flight += 1
                await asyncio.sleep((await self._send(values, time.monotonic())).retry_after_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._load.concurrency or 0):
                tasks.create_task(caller())

    async def _send(self, values: dict[str, Any], due_s: float) -> Outcome:
        """Sends one request to its end, again where it is refused."""
        outcome = Outcome()
        await self._send_once(values, outcome)
        while outcome.status == REJECTED and outcome.rejections <= self._load.retries:
            await asyncio.sleep(outcome.retry_after_s)
            await self._send_once(values, outcome)
        self._in_flight -= 1
        outcome.latency_s = time.monotonic() - due_s
        self._note(outcome)
        return outcome

    async def _send_once(self, values: dict[str, Any], outcome: Outcome) -> None:
        self._transport.outcome.set(outcome)
        await self._client.rollout(**values)
        if outcome.code == OK and outcome.samples != values["num_outputs_per_prompt"]:
            outcome.code, outcome.samples = "wrong_answer", 0
        outcome.steps = outcome.samples * values["num_inference_steps"]

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._on_outcome(outcome)
