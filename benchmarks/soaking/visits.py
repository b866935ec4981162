"""How clients behave: well, slowly, impatiently, wrongly. `hostile` has those that mean harm."""

from __future__ import annotations

import asyncio
import random
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.soaking import hostile
from benchmarks.soaking.asks import MAX_UNSENT_BYTES, Ask, asks_of_every_kind, draw_ask, draw_bad
from benchmarks.soaking.books import WORK_ROUTES, Books, ServerCounts
from benchmarks.soaking.truth import Truth
from flowroll.client.exchange import Call

ROLLOUT_ROUTE = WORK_ROUTES[0]
_TIMEOUT = httpx.Timeout(120.0)
# So small that an answer of MiB fills it, and the server has to wait for its reader.
_SLOW_BUFFER_BYTES = 32 * 2**10
_SLOW_READ_S = 0.02
# What a good request may be answered with where nobody takes it back.
_USUAL = frozenset({200, 409, 429})


def http_client(url: str, *, is_slow: bool = False) -> httpx.AsyncClient:
    """A client of the server; a slow one has next to no room for what it has not read."""
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER_BYTES)] if is_slow else None
    transport = httpx.AsyncHTTPTransport(socket_options=options)
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, transport=transport)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """One client of one server.

    Attributes:
        http: Its connections.
        url: The address of the server.
        source: The source of its chances.
        books: Where it notes what happened.
        truth: What answers must be.
        check_share: Share of the answers that are checked.
    """

    http: httpx.AsyncClient
    url: httpx.URL
    source: random.Random
    books: Books
    truth: Truth
    check_share: float

    async def visit(self) -> None:
        """Does one thing."""
        ways: Mapping[Callable[[], Awaitable[None]], int] = {
            self.ask: 40,
            self.ask_with_deadline: 8,
            self.ask_and_abort: 8,
            self.leave_waiting: 8,
            self.leave_reading: 6,
            self.leave_sending: 4,
            self.read_slowly: 4,
            self.ask_wrongly: 12,
            self.crowd: 2,
            self.look: 4,
            **hostile.ways(self),
        }
        (way,) = self.source.choices(list(ways), weights=list(ways.values()))
        name = way.__name__
        self.books.behaviours[name] += 1
        try:
            await way()
        except (httpx.HTTPError, OSError) as error:
            self.wrong(f"{name}: {type(error).__name__} {error}")

    async def ask(self) -> None:
        """A good request, read to its end."""
        await self._answered(draw_ask(self.source), _USUAL)

    async def fill_caches(self) -> None:
        """Good requests that share forwards in every way, so that what a server remembers of forwards is at its bound."""
        for ask in asks_of_every_kind():
            await self._answered(ask, _USUAL)

    async def ask_with_deadline(self) -> None:
        """A good request that may be given up."""
        seconds = self.source.choice((0.001, 0.05, 0.2, 1.0, 60.0))
        headers = {"x-flowroll-deadline-s": str(seconds)}
        await self._answered(draw_ask(self.source, large=self.source.random() < 0.5), _USUAL | {408}, headers)

    async def ask_and_abort(self) -> None:
        """A good request that is aborted by its id, at any moment of its life."""
        name = uuid.uuid4().hex
        ask = draw_ask(self.source, large=True)
        answer = asyncio.create_task(self._answered(ask, _USUAL | {499}, request_id=name))
        await asyncio.sleep(self.source.uniform(0, 0.4))
        aborted = await self.http.post("/abort_request", json={"request_id": name})
        if aborted.status_code != 200 or aborted.json()["num_aborted"] not in (0, 1):
            self.wrong(f"abort: {aborted.status_code} {aborted.text[:200]}")
        await answer

    async def leave_waiting(self) -> None:
        """A good request whose client is gone before the answer."""
        call = draw_ask(self.source, large=True).call()
        assert call.content is not None
        reader, writer = await asyncio.open_connection(self.url.host, self.url.port)
        writer.write(request_head(call, len(call.content)) + call.content)
        self.books.sent += 1
        with suppress(TimeoutError):
            # An answer that is faster than the client's patience is a refusal, or a result.
            status_line = await asyncio.wait_for(reader.readline(), self.source.uniform(0.0, 0.15))
            self.books.answers[int(status_line.split()[1])] += 1
            writer.transport.abort()
            return
        self.books.left_waiting += 1
        writer.transport.abort()

    async def leave_reading(self) -> None:
        """A good request whose client is gone in the middle of the answer's body."""
        call = draw_ask(self.source, large=True).call()
        self.books.sent += 1
        async with self.stream(call) as response:
            self.note(response.status_code, _USUAL)
            async for _ in response.aiter_raw(self.source.choice((100, 10_000, 1_000_000))):
                break

    async def leave_sending(self) -> None:
        """A client that is gone in the middle of its request's body."""
        call = draw_ask(self.source).call()
        assert call.content is not None
        _, writer = await asyncio.open_connection(self.url.host, self.url.port)
        writer.write(request_head(call, len(call.content)) + call.content[: len(call.content) // 2])
        self.books.sent += 1
        self.books.left_sending += 1
        await asyncio.sleep(self.source.uniform(0.0, 0.3))
        writer.transport.abort()

    async def read_slowly(self) -> None:
        """A good request with a large answer, of which a little is read at a time."""
        ask = draw_ask(self.source, large=True)
        call = ask.call()
        self.books.sent += 1
        body = bytearray()
        async with http_client(str(self.url), is_slow=True) as http, self.stream(call, http=http) as response:
            self.note(response.status_code, _USUAL)
            async for piece in response.aiter_raw(_SLOW_BUFFER_BYTES):
                body += piece
                await asyncio.sleep(_SLOW_READ_S)
        await self._check(ask, call, response, body)

    async def ask_wrongly(self) -> None:
        """A request that must be refused."""
        bad = draw_bad(self.source)
        self.books.sent += 1
        headers = {"content-type": "application/json", **bad.headers}
        response = await self.http.post(ROLLOUT_ROUTE, content=bad.body, headers=headers)
        self.note(response.status_code, bad.statuses)
        if response.json().keys() != {"error"} or "Traceback" in response.text:
            self.wrong(f"an error's body is {response.text[:200]}")

    async def crowd(self) -> None:
        """More good requests at once than the queue takes."""
        await asyncio.gather(*(self._answered(draw_ask(self.source), _USUAL) for _ in range(16)))

    async def look(self) -> None:
        """What a monitor asks."""
        for path in ("/liveness", "/health", "/server_info", "/metrics"):
            began_s = time.perf_counter()
            response = await self.http.get(path)
            if path == "/liveness":
                self.books.alive_s.append(time.perf_counter() - began_s)
            if response.status_code != 200:
                self.wrong(f"{path}: {response.status_code}")
        held_bytes = ServerCounts.read(response.text).held_bytes
        self.books.held_bytes = max(self.books.held_bytes, held_bytes)
        # Environments of some prompts are no part of what a server expects of an answer.
        if held_bytes > 1.25 * MAX_UNSENT_BYTES:
            self.wrong(f"answers of {held_bytes} bytes are held")

    async def _answered(
        self, ask: Ask, expected: frozenset[int], headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        call = ask.call(**more)
        self.books.sent += 1
        body = bytearray()
        async with self.stream(call, {"x-flowroll-dialect": ask.dialect, **(headers or {})}) as response:
            self.note(response.status_code, expected)
            async for piece in response.aiter_raw():
                body += piece
        await self._check(ask, call, response, body)

    def stream(
        self, call: Call[Any], headers: Mapping[str, str] | None = None, *, http: httpx.AsyncClient | None = None
    ) -> Any:
        """Sends a request and reads its answer as it comes."""
        return (http or self.http).stream(
            call.method, call.path, content=call.content, headers={**call.headers, **(headers or {})}
        )

    def note(self, status: int, expected: frozenset[int]) -> None:
        """Notes the status of an answer."""
        self.books.answers[status] += 1
        if status not in expected:
            self.wrong(f"an answer must be one of {sorted(expected)}, got {status}")

    async def _check(self, ask: Ask, call: Call[list[Any]], response: httpx.Response, body: bytearray) -> None:
        if response.status_code != 200:
            return
        samples = call.read(body, response.headers["content-type"])
        self.books.samples += len(samples)
        if self.source.random() >= self.check_share:
            return
        sample = self.source.choice(samples)
        differing = await self.truth.differences(ask, sample)
        self.books.checked += 1
        if differing:
            self.wrong(f"{differing} of seed {sample.seed}, weights {sample.weight_version}, differ for {ask}")

    def wrong(self, what: str) -> None:
        """Notes what broke a promise."""
        self.books.wrong.append(what)
        print("WRONG:", what, flush=True)


def request_head(call: Call[Any], length: int) -> bytes:
    """The headers of a request as bytes."""
    lines = [f"POST {call.path} HTTP/1.1", "host: localhost", f"content-length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in call.headers.items()), "", ""]).encode()
