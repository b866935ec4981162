"""Sends a load to a server and measures every answer as it arrives. Answers are neither kept nor decoded."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import httpx

from flowroll.client import calls
from flowroll.client.exchange import retry_after_s
from flowroll.client.route import check_timeout, check_wire_format, route_to
from flowroll.errors import ServerConnectionError
from flowroll.loadgen.plan import Load, Mix, arrivals
from flowroll.loadgen.report import OK, REJECTED, LoadReport, Outcome, summarize
from flowroll.types import Number
from flowroll.wire.codec import JSON, MSGPACK, WireFormat

_DEFAULT_RETRY_S = 1.0
_MAX_ERROR_BYTES = 64 * 1024
_KEPT_CONNECTIONS = 16
# The key of a sample's image. In a JSON text the second quote of a prompt would be escaped.
_SAMPLE_KEYS = {JSON: b'"generated_output":', MSGPACK: b"\xb0generated_output"}


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
    # Any number may be in flight: waiting for a connection of our own would be no latency of the server. Few are kept for
    # later: the pool of httpcore looks at all pairs of those whenever a request begins or ends.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS)
    way = route_to(url, api_key=api_key, has_transport=True)
    async with way.open(httpx.AsyncClient, httpx.AsyncHTTPTransport(limits=limits)) as http:
        run = _Run(http, load, check_wire_format(wire_format), check_timeout(timeout_s), on_outcome)
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
        self,
        http: httpx.AsyncClient,
        load: Load,
        wire_format: WireFormat,
        timeout_s: float,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._http, self._load, self._wire_format = http, load, wire_format
        self._timeout_s, self._on_outcome = timeout_s, on_outcome
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
        """Keeps `concurrency` requests in flight."""

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
        """Sends a request and reads its answer to the end; counts of earlier attempts are added to."""
        call = calls.rollout(self._wire_format, **values)
        outcome.status, outcome.code, outcome.samples, outcome.retry_after_s = None, OK, 0, 0.0
        error_body = bytearray()
        timeout = call.timeout(self._timeout_s)
        try:
            async with self._http.stream(
                "POST", call.path, content=call.async_body(), headers=call.headers, timeout=timeout
            ) as answer:
                outcome.status = answer.status_code
                outcome.stages = stages_of(answer.headers.get("x-flowroll-timing", ""))
                media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
                key, tail = _SAMPLE_KEYS.get(media_type), b""
                async for piece in answer.aiter_raw():
                    outcome.received_bytes += len(piece)
                    if not answer.is_success:
                        error_body += piece[: _MAX_ERROR_BYTES - len(error_body)]
                    elif key is not None:
                        outcome.samples += (tail + piece).count(key)
                        # Too short to contain the key once more.
                        tail = (tail + piece)[1 - len(key) :]
        except httpx.HTTPError as error:
            outcome.code, outcome.samples = type(error).__name__, 0
        else:
            if not answer.is_success:
                outcome.code = error_code(error_body)
            elif outcome.samples != values["num_outputs_per_prompt"]:
                outcome.code, outcome.samples = "wrong_answer", 0
        if outcome.status == REJECTED:
            outcome.rejections += 1
            outcome.retry_after_s = retry_after_s(answer.headers.get("retry-after", ""), _DEFAULT_RETRY_S)
        outcome.steps = outcome.samples * values["num_inference_steps"]

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._on_outcome(outcome)


def error_code(body: bytes | bytearray) -> str:
    """Returns the code in an error's body; "unknown" where there is none, as from other servers or a proxy."""
    try:
        return str(json.loads(body)["error"]["code"])[:80] or "unknown"
    except (ValueError, TypeError, LookupError, RecursionError):
        return "unknown"


def stages_of(header: str) -> dict[str, float]:
    """Seconds by stage from `queue;dur=0.1, encode;dur=8.2`, which is in milliseconds."""
    found = re.findall(r"([\w-]+)(?:;[^;,]*)*;dur=(\d+(?:\.\d+)?)", header[:1000])
    return {stage: float(milliseconds) / 1000 for stage, milliseconds in found}
