"""A body in tiny chunks costs a server a hundred times what it costs its sender: nobody else may have to wait for it."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import h11
import httpx
import pytest
from tests.serving.servers import SMALL, WAIT_S, error_of, serving
from tests.serving.test_hostile import CHUNKED, CLOSE, chunked, connected, post, read_answer

from flowroll.engine.service import EngineService
from flowroll.serving.connections import BoundedProtocol

KEY = "s3cret"
GOOD = json.dumps({**SMALL, "num_inference_steps": 1}).encode()
TINY = chunked(b" ") * 40_000
# Before there was a guard: seconds. Of the promise, 100 ms for 99 of 100, a shared machine gets some room here.
MOST_S = 0.25


@pytest.fixture(scope="module")
def locked(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service, api_key=KEY) as client:
        yield client


def attack(client: httpx.Client, raw: bytes, ended: threading.Event) -> None:
    while not ended.is_set():
        with connected(client) as connection, contextlib.suppress(ConnectionError, TimeoutError):
            connection.settimeout(1.0)
            connection.sendall(raw)
            while connection.recv(1 << 16):
                pass


@pytest.mark.parametrize(
    "head",
    [post(CHUNKED, path=b"/nope"), post(CHUNKED), post(CHUNKED, b"Authorization: Bearer " + KEY.encode())],
    ids=["no route", "no key", "a key"],
)
def test_tiny_chunks_keep_nobody_waiting(locked: httpx.Client, head: bytes) -> None:
    """A megabyte of them kept /liveness waiting for 3 s, eight connections without a key for 15 s, with a key for 40 s."""
    ended = threading.Event()
    attackers = [threading.Thread(target=attack, args=(locked, head + TINY, ended)) for _ in range(8)]
    for thread in attackers:
        thread.start()
    try:
        seconds = []
        for _ in range(60):
            started_s = time.perf_counter()
            assert locked.get("/liveness").status_code == 200
            seconds.append(time.perf_counter() - started_s)
            time.sleep(0.02)
    finally:
        ended.set()
        for thread in attackers:
            thread.join(WAIT_S)
    assert sorted(seconds)[-2] < MOST_S, sorted(seconds)[-5:]


def test_a_body_in_tiny_chunks_is_refused_with_its_reason(locked: httpx.Client) -> None:
    with connected(locked) as connection:
        connection.sendall(post(CHUNKED, b"Authorization: Bearer " + KEY.encode(), body=chunked(b" ") * 2000))
        status, body = read_answer(connection)
    assert status == 400
    message = error_of(httpx.Response(status, content=body))["message"]
    assert message == (
        "the body must come in chunks of 256 bytes or more, 1024 smaller ones aside, got 1029 chunks in 1029 bytes; send it in "
        "larger chunks, or with a Content-Length."
    )


@pytest.mark.parametrize("size", [1, 300, 70_000])
def test_a_body_in_chunks_that_is_honest_is_read(locked: httpx.Client, size: int) -> None:
    """All of it, also what comes while the server takes turns."""
    body = GOOD if size == 1 else GOOD.ljust(2_000_000)
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    with connected(locked) as connection:
        key = b"Authorization: Bearer " + KEY.encode()
        connection.sendall(post(CHUNKED, CLOSE, key, body=chunked(*pieces, b"")))
        status, answer = read_answer(connection)
    assert status == 200, answer


AUTHORIZED = b"Authorization: Bearer " + KEY.encode()
LARGE = b"Content-Length: 100000"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (post(LARGE), 401),
        (post(LARGE, AUTHORIZED, path=b"/nope"), 404),
        (post(b"Content-Length: 9999999999", AUTHORIZED), 413),
        (post(LARGE, AUTHORIZED, b"Content-Encoding: gzip"), 415),
        (post(CHUNKED), 401),
        (post(CHUNKED, AUTHORIZED, path=b"/nope"), 404),
        (post(CHUNKED, b"Expect: 100-continue"), 401),
    ],
    ids=["no key", "no route", "too large", "compressed", "chunks, no key", "chunks, no route", "chunks, expecting"],
)
def test_a_request_that_is_refused_before_its_body_has_come_is_the_last_of_its_connection(
    locked: httpx.Client, monkeypatch: pytest.MonkeyPatch, head: bytes, status: int
) -> None:
    looked_at: list[bytes] = []
    with connected(locked) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b"\r\nconnection: close\r\n" in answer
        monkeypatch.setattr(h11.Connection, "receive_data", lambda self, data: looked_at.append(data))
        # It may still come, and nobody looks at it.
        connection.sendall(TINY)
        assert _ends(connection)
    assert not looked_at


def test_a_client_may_send_all_of_its_body_before_it_reads_why_it_was_refused(locked: httpx.Client) -> None:
    answer = locked.post("/nope", content=bytes(20 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 401


def test_who_goes_on_sending_after_a_refusal_is_cut_off(service: EngineService) -> None:
    with serving(service, receive_timeout_s=0.3) as client, connected(client) as connection:
        connection.sendall(post(CHUNKED, path=b"/nope"))
        assert b" 404 " in connection.recv(1 << 16)
        with pytest.raises(ConnectionError):
            while True:
                connection.send(TINY[:6000])
                time.sleep(0.01)


def test_a_connection_goes_on_after_a_refusal_of_a_request_that_was_whole(locked: httpx.Client) -> None:
    with connected(locked) as connection:
        for _ in range(3):
            connection.sendall(post(b"Content-Length: %d" % len(GOOD), body=GOOD))
            received = b""
            while not received.endswith(b"}}"):
                received += connection.recv(1 << 16)
            assert b" 401 " in received and b"connection: close" not in received


def test_connections_beyond_the_bound_are_told_so(service: EngineService) -> None:
    with serving(service, max_connections=3) as client, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(client)) for _ in range(3)]
        assert _status(held[0]) == 200
        with connected(client) as refused:
            status, body = read_answer(refused)
        error = error_of(httpx.Response(status, content=body))
        assert (status, error["code"]) == (429, "queue_full") and "at most 3 connections" in error["message"]
        assert _status(held[2]) == 200
        held[1].close()
        deadline_s = time.monotonic() + WAIT_S
        while client.get("/liveness").status_code != 200:
            assert time.monotonic() < deadline_s


def _status(connection: socket.socket) -> int:
    connection.sendall(b"GET /liveness HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return int(connection.recv(1 << 16).split()[1])


def test_a_turn_of_the_event_loop_looks_at_a_part_of_what_has_come(
    locked: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 chunks in one read are looked at in dozens of turns, between which others have theirs."""
    looked_at: list[int] = []
    handle_events = BoundedProtocol.handle_events

    def observed(self: BoundedProtocol) -> None:
        looked_at.append(0)
        handle_events(self)

    def counted(self: h11.Connection) -> object:
        looked_at[-1] += 1
        return next_event(self)

    next_event = h11.Connection.next_event
    monkeypatch.setattr(BoundedProtocol, "handle_events", observed)
    monkeypatch.setattr(h11.Connection, "next_event", counted)
    with connected(locked) as connection:
        key = b"Authorization: Bearer " + KEY.encode()
        connection.sendall(post(CHUNKED, CLOSE, key, body=chunked(*[b" "] * 1000, b"")))
        assert read_answer(connection)[0] == 400
    assert sum(looked_at) > 1000 and max(looked_at) <= 32


def _ends(connection: socket.socket) -> bool:
    """Whether the other end has ended its sending, and goes once this one does."""
    connection.shutdown(socket.SHUT_WR)
    return connection.recv(1) == b""
