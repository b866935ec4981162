"""Clients that mean harm: each does in small what once stalled, starved or filled a server."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from benchmarks.soaking.asks import draw_ask
from benchmarks.soaking.books import WORK_ROUTES

if TYPE_CHECKING:
    from benchmarks.soaking.visits import Visitor

_CHUNK = b"1\r\n \r\n"
_MANY_CHUNKS = 20_000
_NUM_DEAD = 8
_NUM_POLLS = 4
_DRIP_BYTES, _DRIP_S, _MOST_DRIPS = 1024, 0.02, 1500
_CONTROLS = ("/pause_generation", "/release_memory_occupation", "/weights/begin", "/abort_request", "/health_generate")
_FOREIGN = (
    {"origin": "http://elsewhere.example"},
    {"sec-fetch-site": "cross-site"},
    {"origin": "null"},
    {"host": "rebound.example"},
)


def ways(visitor: Visitor) -> dict[Callable[[], Awaitable[None]], int]:
    """What such a client may do, and how often it does."""
    chosen = {drip_chunks: 3, poll: 3, post_and_die: 3, drip_reading: 2, browse: 4}
    bound: dict[Callable[[], Awaitable[None]], int] = {}
    for way, weight in chosen.items():
        bound[functools.wraps(way)(functools.partial(way, visitor))] = weight
    return bound


async def drip_chunks(visitor: Visitor) -> None:
    """A body in chunks of a byte, as many as the server takes, to a route or to none."""
    path = visitor.source.choice((WORK_ROUTES[0], "/nowhere"))
    reader, writer = await asyncio.open_connection(visitor.url.host, visitor.url.port)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    if path in WORK_ROUTES:
        # Refused by its connection; the route saw a client that left while it sent.
        visitor.books.sent += 1
        visitor.books.left_sending += 1
    with suppress(ConnectionError):
        writer.write(head.encode() + _CHUNK * _MANY_CHUNKS)
        status = (await reader.readline()).split()
        if status[1:2] not in ([b"400"], [b"404"]):
            visitor.wrong(f"a body in tiny chunks got {status}")
        await reader.read()
    writer.transport.abort()


async def poll(visitor: Visitor) -> None:
    """What costs its sender nothing and the engine something."""
    sent = {"module_names": ["transformer"]}
    for answer in await asyncio.gather(
        *(visitor.http.post("/get_weights_checksum", json=sent) for _ in range(_NUM_POLLS)),
        *(visitor.http.get("/health_generate") for _ in range(_NUM_POLLS)),
    ):
        if answer.status_code not in (200, 409, 429, 503):
            visitor.wrong(f"a poll got {answer.status_code} {answer.text[:200]}")


async def post_and_die(visitor: Visitor) -> None:
    """Good requests whose clients are gone as soon as they are sent."""
    from benchmarks.soaking.visits import request_head

    for _ in range(_NUM_DEAD):
        call = draw_ask(visitor.source).call()
        assert isinstance(call.content, bytes)
        _, writer = await asyncio.open_connection(visitor.url.host, visitor.url.port)
        writer.write(request_head(call, len(call.content)) + call.content)
        visitor.books.sent += 1
        visitor.books.left_waiting += 1
        writer.close()


async def drip_reading(visitor: Visitor) -> None:
    """A good request with a large answer, of which next to nothing is read at a time; the server lets go of such a client."""
    from benchmarks.soaking.visits import http_client

    visitor.books.sent += 1
    with suppress(httpx.ReadError, httpx.RemoteProtocolError):
        async with (
            http_client(str(visitor.url), is_slow=True) as http,
            visitor.stream(draw_ask(visitor.source, large=True).call(), http=http) as response,
        ):
            visitor.note(response.status_code, frozenset({200, 409, 429}))
            drips = 0
            async for _ in response.aiter_raw(_DRIP_BYTES):
                await asyncio.sleep(_DRIP_S)
                drips += 1
                if drips == _MOST_DRIPS:
                    break


async def browse(visitor: Visitor) -> None:
    """What a page of another site has a browser send."""
    path, headers = visitor.source.choice(_CONTROLS), visitor.source.choice(_FOREIGN)
    method = "GET" if path == "/health_generate" else "POST"
    answer = await visitor.http.request(method, path, headers=headers)
    if answer.status_code != 403:
        visitor.wrong(f"a page of another site got {answer.status_code} from {path} with {headers}")
