"""Sends a plan to a server and notes how every request ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import httpx

from flowroll.client import calls, exchange
from flowroll.errors import ServerConnectionError
from flowroll.loadgen.answer import error_code, sample_counter, stages_of
from flowroll.loadgen.plan import Load, Mix, arrivals, requests, values_of, warmup_requests
from flowroll.loadgen.report import OK, REJECTED, LoadReport, Outcome, Tally
from flowroll.types import Number, SamplingParams
from flowroll.wire.codec import WireFormat

_TIMING_HEADER = "x-flowroll-timing"
_DEFAULT_RETRY_S = 1.0
_MAX_ERROR_BYTES = 64 * 1024
# What a server said that answered, but not what was asked.
WRONG_ANSWER = "wrong_answer"
# What became of a request that was due while too many were in flight.
NOT_SENT = "not_sent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server, and how it is spoken to.

    Attributes:
        url: E.g. "http://127.0.0.1:30000".
        api_key: Its bearer token, if it demands one.
        wire_format: "json", which every server with the API has, or "msgpack".
        timeout_s: Longest silence of the server.
    """

    url: str
    api_key: str | None = None
    wire_format: WireFormat = "json"
    timeout_s: Number = exchange.DEFAULT_TIMEOUT_S


async def run_load(
    target: Target, mix: Mix, load: Load, *, on_outcome: Callable[[Outcome], None] = lambda outcome: None
) -> LoadReport:
    """Sends the load and waits for every answer.

    Args:
        target: Where to.
        mix: What.
        load: When.
        on_outcome: Called whenever a request has ended.

    Raises:
        ServerConnectionError: A request of the warm-up failed, other than by 429.
        InvalidRequestError: The URL or the key cannot be used in HTTP.
    """
    # Any number may be in flight: waiting for a connection of the client's own would be no latency of the server.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    options = exchange.client_options(target.url, target.api_key)
    # Not compressed, so that bytes are those of the wire, and its samples can be counted.
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    async with httpx.AsyncClient(**options, headers=headers, limits=limits) as http:
        sender = _Sender(http, target, mix)
        await sender.warm_up(load.warmup)
        run = _Run(sender, load, islice(requests(mix), load.num_requests), on_outcome)
        if load.rate is not None:
            await run.open_loop(arrivals(load.rate, mix.seed))
        else:
            await run.closed_loop()
        return run.tally.report(time.monotonic() - run.started_s)


class _Sender:
    """Sends one request at a time to its end."""

    def __init__(self, http: httpx.AsyncClient, target: Target, mix: Mix) -> None:
        self._http, self._target, self._mix = http, target, mix

    async def warm_up(self, num_requests: int) -> None:
        for params in islice(warmup_requests(self._mix), num_requests):
            outcome, wait_s = await self.send(params)
            if outcome.code != OK and outcome.status != REJECTED:
                raise ServerConnectionError(
                    f"the server at {self._target.url} must answer the warm-up, got {outcome.status or 'no answer'} "
                    f"{outcome.code}; check the URL and the requests."
                )
            await asyncio.sleep(wait_s)

    async def send(self, params: SamplingParams) -> tuple[Outcome, float]:
        """Sends a request once; gives how it ended, and how long the server wants its caller to wait."""
        call = calls.rollout(self._target.wire_format, **values_of(params, self._mix))
        status, received = None, 0
        started_s = time.monotonic()
        try:
            async with self._http.stream(
                call.method,
                call.path,
                content=call.async_body(),
                headers=call.headers,
                timeout=call.timeout(self._target.timeout_s),
            ) as response:
                status, wait_s = response.status_code, 0.0
                counter, error_body = sample_counter(response.headers.get("content-type", "")), b""
                async for piece in response.aiter_bytes():
                    received += len(piece)
                    counter.add(piece)
                    if not response.is_success and len(error_body) < _MAX_ERROR_BYTES:
                        error_body += piece
        except httpx.HTTPError as error:
            latency_s = time.monotonic() - started_s
            return Outcome(status=status, code=type(error).__name__, latency_s=latency_s, received_bytes=received), 0.0
        samples, code = counter.total(), OK
        if status == REJECTED:
            wait_s = exchange.retry_after_s(response.headers.get("retry-after", ""), _DEFAULT_RETRY_S)
        if not response.is_success:
            samples, code = 0, error_code(error_body)
        elif samples != params.num_outputs_per_prompt:
            samples, code = 0, WRONG_ANSWER
        outcome = Outcome(
            status=status,
            code=code,
            latency_s=time.monotonic() - started_s,
            samples=samples,
            steps=samples * (params.num_inference_steps or 0),
            received_bytes=received,
            rejections=int(status == REJECTED),
            stages=stages_of(response.headers.get(_TIMING_HEADER, "")),
        )
        return outcome, wait_s


class _Run:
    def __init__(
        self, sender: _Sender, load: Load, planned: Iterator[SamplingParams], on_outcome: Callable[[Outcome], None]
    ) -> None:
        self._sender, self._load, self._planned, self._on_outcome = sender, load, planned, on_outcome
        self._in_flight = 0
        self.tally = Tally()
        self.started_s = time.monotonic()
        self._end_s = self.started_s + (float("inf") if load.duration_s is None else load.duration_s)

    async def open_loop(self, offsets: Iterator[float]) -> None:
        """Starts every request when it is due, whatever became of the others."""
        async with asyncio.TaskGroup() as tasks:
            for params, offset_s in zip(self._planned, offsets, strict=False):
                due_s = self.started_s + offset_s
                if due_s >= self._end_s:
                    return
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                if self._in_flight < self._load.max_in_flight:
                    # Counted here: the task itself begins later.
                    self._in_flight += 1
                    tasks.create_task(self._send(params, due_s))
                else:
                    self._note(Outcome(status=None, code=NOT_SENT, latency_s=0.0))

    async def closed_loop(self) -> None:
        """Keeps so many requests in flight."""
        assert self._load.concurrency is not None
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._load.concurrency):
                tasks.create_task(self._caller())

    async def _caller(self) -> None:
        while time.monotonic() < self._end_s and (params := next(self._planned, None)) is not None:
            self._in_flight += 1
            await asyncio.sleep(await self._send(params, time.monotonic()))

    async def _send(self, params: SamplingParams, due_s: float) -> float:
        """Sends one request, again where it is refused; returns how long its caller has to wait before the next."""
        rejections = received = 0
        while True:
            outcome, wait_s = await self._sender.send(params)
            rejections += outcome.rejections
            received += outcome.received_bytes
            if outcome.status != REJECTED or rejections > self._load.retries:
                break
            await asyncio.sleep(wait_s)
        self._in_flight -= 1
        latency_s = time.monotonic() - due_s
        self._note(replace(outcome, latency_s=latency_s, received_bytes=received, rejections=rejections))
        return wait_s

    def _note(self, outcome: Outcome) -> None:
        self.tally.add(outcome)
        self._on_outcome(outcome)
