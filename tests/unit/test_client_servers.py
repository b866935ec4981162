"""Clients of several servers: which one is asked, when another one is, and what is refused."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.factories import make_rollout

from flowroll.client import AsyncClient, Client, calls
from flowroll.client.balancing import Balancer
from flowroll.errors import (
    EngineError,
    FlowrollError,
    InvalidRequestError,
    OutdatedWeightsError,
    QueueFullError,
    ServerConnectionError,
    ShuttingDownError,
)
from flowroll.wire.codec import encode_rollouts

URLS = ("http://a.test:30000", "http://b.test:30000", "http://c.test:30000")
KINDS = ("sync", "async")
Handler = Callable[[httpx.Request], httpx.Response]


def ask(kind: str, handler: Handler, *requests: dict[str, Any], urls: Any = URLS, method: str = "rollout") -> list[Any]:
    """What each request ends in, one after the other."""
    transport = httpx.MockTransport(handler)
    if kind == "sync":
        with Client(urls, transport=transport) as client:
            return [_ended(lambda r=request: getattr(client, method)(**r)) for request in requests]

    async def run() -> list[Any]:
        async with AsyncClient(urls, transport=transport) as client:
            return [await _ended_async(getattr(client, method), request) for request in requests]

    return asyncio.run(run())


def _ended(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except FlowrollError as error:
        return error


async def _ended_async(call: Any, request: dict[str, Any]) -> Any:
    try:
        return await call(**request)
    except FlowrollError as error:
        return error


def answer(request: httpx.Request) -> httpx.Response:
    """A rollout of what was asked for."""
    asked = json.loads(request.content)
    rollout = make_rollout(prompt=asked["prompt"], seed=asked["seed"], request_id="one")
    body = encode_rollouts([rollout], wire_format="msgpack")
    return httpx.Response(200, content=b"".join(body.chunks()), headers={"content-type": body.content_type})


def refusal(error: FlowrollError, **headers: str) -> httpx.Response:
    detail = {"code": error.code, "message": error.message, "field": None}
    return httpx.Response(error.status, json={"error": detail}, headers=headers)


ONE = {"prompt": "a red fox", "seed": 7}


@pytest.mark.parametrize("kind", KINDS)
def test_requests_take_turns_where_all_servers_are_idle(kind: str):
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return answer(request)

    answers = ask(kind, handler, *[ONE] * 6)
    assert [rollouts[0].seed for rollouts in answers] == [7] * 6
    assert seen == ["a.test", "b.test", "c.test"] * 2


def test_work_is_counted_in_image_steps():
    balancer = Balancer(2)
    large = balancer.attempts(24 * 28)
    assert next(large).index == 0
    small = [balancer.attempts(28) for _ in range(24)]
    assert [next(one).index for one in small] == [1] * 24
    # Equal now; the one whose turn was longer ago is next.
    assert next(balancer.attempts(1)).index == 0
    for one in (large, *small):
        one.close()
    assert balancer._in_flight == [0, 0]


@pytest.mark.parametrize(
    ("asked", "image_steps"),
    [
        ({"num_outputs_per_prompt": 4, "num_inference_steps": 10}, 40),
        ({"seeds": [1, 2, 3], "sigmas": (1.0, 0.5, 0.0)}, 6),
        ({"num_inference_steps": 8, "fork": {2: 4}}, 32),
        ({}, 28),
    ],
)
def test_a_request_says_how_much_work_it_is(asked: dict[str, Any], image_steps: int):
    assert calls.rollout("json", "a red fox", **asked).image_steps == image_steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "failure",
    [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("gone"), httpx.ReadTimeout("silent")],
    ids=lambda error: type(error).__name__,
)
def test_a_server_that_gives_no_answer_is_left_for_another(kind: str, failure: Exception):
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        if request.url.host == "a.test":
            raise failure
        return answer(request)

    first, second = ask(kind, handler, ONE, ONE)
    assert first[0].seed == second[0].seed == 7
    # It is asked last for a while.
    assert seen == ["a.test", "b.test", "c.test"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [ShuttingDownError("it stops."), QueueFullError("it is full."), OutdatedWeightsError("they are older.")],
    ids=lambda error: error.code,
)
def test_a_server_that_does_not_take_a_request_now_is_left_for_another(kind: str, error: FlowrollError):
    answers = ask(kind, lambda request: refusal(error) if request.url.host == "a.test" else answer(request), ONE)
    assert answers[0][0].seed == 7


class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off."""

    def __iter__(self) -> Any:
        yield b"["
        raise httpx.ReadError("reset")

    async def __aiter__(self) -> Any:
        yield b"["
        raise httpx.ReadError("reset")


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_has_begun_is_not_asked_for_again(kind: str):
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return httpx.Response(200, stream=Broken(), headers={"content-type": "application/json"})

    (ended,) = ask(kind, handler, ONE)
    assert isinstance(ended, ServerConnectionError) and seen == ["a.test"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [EngineError("it failed."), InvalidRequestError("steps must be fewer.")])
def test_what_another_server_would_answer_too_is_raised(kind: str, error: FlowrollError):
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return refusal(error)

    (ended,) = ask(kind, handler, ONE)
    assert type(ended) is type(error) and seen == ["a.test"]


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_are_full_the_soonest_appointment_counts(kind: str):
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "a.test":
            return refusal(ShuttingDownError("it stops."))
        return refusal(QueueFullError("it is full."), **{"retry-after": "5" if request.url.host == "b.test" else "3"})

    (ended,) = ask(kind, handler, ONE)
    assert isinstance(ended, QueueFullError) and ended.retry_after_s == 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_about_one_server_is_asked_of_one(kind: str):
    (ended,) = ask(kind, answer, {}, method="health")
    assert isinstance(ended, InvalidRequestError) and "client.servers" in ended.message


@pytest.mark.parametrize("kind", KINDS)
def test_all_servers_are_waited_for(kind: str):
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return httpx.Response(200, json={"status": "ok"})

    ask(kind, handler, {}, method="wait_ready")
    assert seen == ["a.test", "b.test", "c.test"]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("urls", [[], [URLS[0], URLS[0]]])
def test_no_server_and_the_same_one_twice_are_refused(kind: Any, urls: list[str]):
    with pytest.raises(InvalidRequestError, match="base_url"):
        kind(urls)
