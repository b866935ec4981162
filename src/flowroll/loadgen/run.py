"""Sends a plan to a server and notes how every request ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count, islice

import httpx

from flowroll.client import AsyncClient
from flowroll.errors import FlowrollError, QueueFullError
from flowroll.loadgen.plan import Load, Mix, arrivals, requests, warmup_requests
from flowroll.loadgen.report import OK, LoadReport, Outcome, summarize
from flowroll.types import SamplingParams


class _CountedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, counter: CountingTransport) -> None:
        self._stream, self._counter = stream, counter

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._counter.received_bytes += len(piece)
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


class CountingTransport(httpx.AsyncHTTPTransport):
    """Counts the bytes of bodies, and lets any number of requests be in flight: waiting for a connection is no latency."""

    received_bytes = 0

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None, max_keepalive_connections=None))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request."""
        response = await super().handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _CountedStream(response.stream, self)
        return response


async def run_load(url: str, mix: Mix, load: Load, *, api_key: str | None = None, timeout_s: float = 600.0) -> LoadReport:
    """Sends the load and waits for every answer.

    Raises:
        FlowrollError: A request of the warm-up failed, other than by 429.
    """
    transport = CountingTransport()
    async with AsyncClient(url, api_key=api_key, timeout_s=timeout_s, transport=transport) as client:
        for params in islice(warmup_requests(mix), load.warmup):
            try:
                await client.rollout(params)
            except QueueFullError as error:
                await asyncio.sleep(error.retry_after_s)
        transport.received_bytes = 0
        run = _Run(client, load, islice(requests(mix), load.num_requests))
        if load.rate is not None:
            await run.open_loop(arrivals(load.rate, mix.seed))
        else:
            await run.closed_loop()
        return summarize(run.outcomes, time.monotonic() - run.started_s, transport.received_bytes)


class _Run:
    def __init__(self, client: AsyncClient, load: Load, planned: Iterator[SamplingParams]) -> None:
        self._client, self._load, self._planned = client, load, planned
        self.outcomes: list[Outcome] = []
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
                tasks.create_task(self._send(params, due_s))

    async def closed_loop(self) -> None:
        """Keeps so many requests in flight."""
        assert self._load.concurrency is not None
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._load.concurrency):
                tasks.create_task(self._caller())

    async def _caller(self) -> None:
        while time.monotonic() < self._end_s and (params := next(self._planned, None)) is not None:
            await asyncio.sleep(await self._send(params, time.monotonic()))

    async def _send(self, params: SamplingParams, due_s: float) -> float:
        """Sends one request; returns how long the server wants its caller to wait before the next."""
        for rejections in count():
            code, samples, wait_s = OK, 0, 0.0
            try:
                samples = len(await self._client.rollout(params))
            except QueueFullError as error:
                code, wait_s, rejections = error.code, error.retry_after_s, rejections + 1
                if rejections <= self._load.retries:
                    await asyncio.sleep(wait_s)
                    continue
            except FlowrollError as error:
                code = error.code
            break
        steps = samples * (params.num_inference_steps or 0)
        latency_s = time.monotonic() - due_s
        self.outcomes.append(Outcome(code=code, latency_s=latency_s, samples=samples, steps=steps, rejections=rejections))
        return wait_s
