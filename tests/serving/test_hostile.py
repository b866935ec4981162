"""Bytes that no HTTP library sends: every connection ends, with an answer that is no 5xx, and others are served meanwhile."""

import asyncio
import contextlib
import gzip
import json
import logging
import re
import select
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
import torch
from tests.serving.servers import SMALL, WAIT_S, error_of, read_answer, serving

from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.serving import ServerConfig, create_app
from flowroll.serving.connections import MAX_HEADER_BYTES
from flowroll.wire.safetensors import safetensors_prefix

TIMEOUT_S = 0.4
DRIBBLE_S = 0.01
# By the server's clock; it waits for 20 s.
MOST_AHEAD_S = 60
JSON_HEADERS = {"content-type": "application/json"}
GOOD = json.dumps({**SMALL, "num_inference_steps": 1}).encode()


@pytest.fixture(scope="module")
def hurried(service: EngineService) -> Iterator[httpx.Client]:
    """A server that waits for nobody for long."""
    with serving(service, receive_timeout_s=TIMEOUT_S, max_body_bytes=1 << 20) as client:
        yield client


def post(*headers: bytes, body: bytes = b"", path: bytes = b"/generate") -> bytes:
    return b"\r\n".join(
        [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers, b"", body]
    )


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


LENGTH = b"Content-Length: %d" % len(GOOD)
CHUNKED = b"Transfer-Encoding: chunked"
CLOSE = b"Connection: close"
REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    # The control: the tests' own way of sending is fine.
    "a good request": (post(LENGTH, CLOSE, body=GOOD), {200}),
    "a good request in chunks": (post(CHUNKED, CLOSE, body=chunked(*(bytes([byte]) for byte in GOOD), b"")), {200}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", {400}),
    "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404}),
    "an unknown version": (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", {400, 200}),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", {200}),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", {400}),
    "a giant header": (post(b"X: " + b"x" * (MAX_HEADER_BYTES + 2000), LENGTH, body=GOOD), {400}),
    "many headers": (post(*[b"X-%d: x" % number for number in range(5000)], LENGTH, body=GOOD), {400}),
    "a giant path": (b"GET /" + b"x" * 2 * MAX_HEADER_BYTES + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
    "a null byte in a header": (post(b"X: a\x00b", LENGTH, body=GOOD), {400}),
    "a null byte in the path": (b"GET /%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {404}),
    "a path that is no UTF-8": (b"GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {404}),
    "a path that climbs": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {404}),
    "a whole URL": (b"GET http://other/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {404}),
    "a folded header": (post(b"X: a\r\n b", LENGTH, CLOSE, body=GOOD), {200, 400}),
    "a length in another script": (post("Content-Length: ²".encode("latin-1"), body=GOOD), {400}),
    "a length of 5000 digits": (post(b"Content-Length: " + b"9" * 5000), {400}),
    "a length of 20 digits": (post(b"Content-Length: " + b"9" * 20, CLOSE), {413}),
    "a negative length": (post(b"Content-Length: -1", body=GOOD), {400}),
    "a length with a sign": (post(b"Content-Length: +5", body=GOOD), {400}),
    "conflicting lengths": (post(LENGTH, b"Content-Length: 5", body=GOOD), {400}),
    "conflicting lengths in one header": (post(b"Content-Length: 5, 6", body=GOOD), {400}),
    "a length beside chunks": (post(b"Content-Length: 3", CHUNKED, CLOSE, body=chunked(GOOD, b"")), {200, 400}),
    "two codings": (post(b"Transfer-Encoding: gzip, chunked", body=GOOD), {400}),
    "a chunk of no size": (post(CHUNKED, body=b"zz\r\nabc\r\n"), {400}),
    "a chunk of huge size": (post(CHUNKED, body=b"f" * 40 + b"\r\nabc\r\n"), {400}),
    "a chunk of a size below none": (post(CHUNKED, body=b"-1\r\nabc\r\n"), {400}),
    "a chunk longer than it says": (post(CHUNKED, body=b"1\r\nabc\r\n0\r\n\r\n"), {400}),
    "chunks that are cut": (post(CHUNKED, body=b"100\r\n" + GOOD[:50]), {408}),
    "a body that is cut": (post(LENGTH, body=GOOD[:-1]), {408}),
    "no body where one is declared": (post(LENGTH), {408}),
    "an expectation and no body": (post(LENGTH, b"Expect: 100-continue"), {408}),
    "an upgrade": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\n\r\n",
        {200},
    ),
    "a body of a GET": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n", {200}),
    "a method of nobody": (b"FROB /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {405}),
    "headers that are cut": (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Le", {408}),
    "a request line that is cut": (b"POST /gene", {408}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_answered_and_its_connection_ends(hurried: httpx.Client, name: str) -> None:
    raw, statuses = REQUESTS[name]
    with connected(hurried) as connection:
        # The server may have answered, and gone, before it has all of this.
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
        status, body = read_answer(connection)
    assert status in statuses, (status, body)
    assert b"Traceback" not in body
    if status >= 400:
        error_of(httpx.Response(status, content=body))
    assert hurried.get("/health").status_code == 200


@pytest.mark.parametrize(("name", "code"), [("no HTTP", "400"), ("headers that are cut", "408")])
def test_what_is_answered_without_the_app_has_an_id_a_line_and_a_count(
    hurried: httpx.Client, caplog: pytest.LogCaptureFixture, name: str, code: str
) -> None:
    def counted() -> float:
        series = rf'^flowroll_requests_total{{code="{code}",route="connection"}} (\S+)$'
        return sum(map(float, re.findall(series, hurried.get("/metrics").text, re.MULTILINE)))

    before = counted()
    with caplog.at_level(logging.INFO, "flowroll.serving"), connected(hurried) as connection:
        connection.sendall(REQUESTS[name][0])
        head = b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\r\n\r\n")[0].decode()
    (shown,) = re.findall(r"^x-request-id: (\w+)\r?$", head, re.IGNORECASE | re.MULTILINE)
    told = [vars(record) for record in caplog.records if record.name == "flowroll.serving.connections"]
    assert [(line["request_id"], str(line["status"]), line["error"]) for line in told] == [(shown, code, "malformed_request")]
    assert counted() == before + 1


def test_nobody_who_dribbles_is_waited_for_and_others_are_served_meanwhile(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow loris in headers, in a body of either kind, in the second request of a connection, and after an early answer.

    The server's clock goes a second a round, beside the true one, so that a machine that is slow itself changes nothing.
    """
    healthy = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    starts = {
        "headers": (b"GET /health HTTP/1.1\r\nX: ", b"x"),
        "body": (post(b"Content-Length: 100000"), b" "),
        "chunks": (post(CHUNKED), b"1\r\n \r\n"),
        "headers of a second request": (healthy + b"GET /health HTTP/1.1\r\nX: ", b"x"),
        "body after an early answer": (post(b"Content-Length: 100000", path=b"/nope"), b" "),
        "body that is too large": (post(b"Content-Length: 9999999999"), b" "),
        "silence": (b"", b""),
        "silence after an answer": (healthy, b""),
    }
    ahead_s = 0
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "time", lambda _: time.monotonic() + ahead_s)
    with serving(service) as client, contextlib.ExitStack() as stack:
        waiting = {}
        for number, (name, (start, more)) in enumerate(list(starts.items()) * 3):
            connection = stack.enter_context(connected(client))
            connection.sendall(start)
            waiting[connection] = (f"{name} {number}", more, bytearray())
        answers: dict[str, bytes] = {}
        while waiting and ahead_s < MOST_AHEAD_S:
            ahead_s += 1
            dribble(waiting, answers)
            assert client.get("/health").status_code == 200
        assert not waiting, [name for name, _, _ in waiting.values()]
        assert client.post("/generate", content=GOOD, headers=JSON_HEADERS).status_code == 200
    for name, answer in answers.items():
        expected = b"408" if name.startswith(("headers ", "body ", "chunks ")) else b""
        if name.startswith(("body after", "body that")):
            expected = b"404" if "early" in name else b"413"
        if name.startswith("headers of"):
            assert answer.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 " + expected in answer or name.startswith("silence"), (name, answer)


def test_a_body_that_comes_steadily_may_take_longer_than_the_bound(hurried: httpx.Client) -> None:
    """200 KiB at about a MiB a second: what has come buys time for the rest."""
    body = GOOD.ljust(200 * 1024)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 10 * 1024):
            time.sleep(TIMEOUT_S / 15)
            yield body[start : start + 10 * 1024]

    assert hurried.post("/generate", content=pieces(), headers=JSON_HEADERS).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_megabytes_is_refused_and_not_kept(service: EngineService, declared: bool) -> None:
    piece = b" " * (1 << 20)

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield piece

    headers = {**JSON_HEADERS, **({"content-length": str(100 << 20)} if declared else {})}
    with serving(service, max_score_body_bytes=32 << 20) as server:
        answer = server.post("/generate", content=pieces(), headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")
        assert server.get("/health").status_code == 200


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", "٣", "1" * 19])
def test_a_declared_length_is_no_number_until_it_is_one(service: EngineService, length: str) -> None:
    """Under another server than ours such a header can reach the app."""
    sent: list[dict[str, Any]] = []
    app = create_app(InProcessEngine(service), ServerConfig(model="x"))
    headers = [(b"content-type", b"application/json"), (b"content-length", length.encode("latin-1", "replace"))]
    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == (413 if len(length) > 5 else 400)


BODIES = {
    "utf-16": GOOD.decode().encode("utf-16"),
    "utf-32": GOOD.decode().encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "overlong utf-8": b'{"prompt": "\xc0\xaf"}',
    "a raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "an escaped surrogate": rb'{"prompt": "\ud800"}',
    "a raw null byte": b'{"prompt": "\x00"}',
    "null bytes alone": bytes(1000),
    "deep lists": b'{"prompt": ' + b"[" * 60_000,
    "deep objects": b'{"prompt":' * 5_000,
    "a huge number": b'{"prompt": "a", "seed": ' + b"9" * 60_000 + b"}",
    "a huge exponent": b'{"prompt": "a", "guidance_scale": 1e999999999}',
    "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
    "two values": GOOD + GOOD,
    "a comment": b"/* */" + GOOD,
    "a gzip bomb": gzip.compress(bytes(10_000_000)),
    "no value": b" \n\t ",
}


@pytest.mark.parametrize("path", ["/rollout/generate", "/rollout/score", "/update_weights_from_disk", "/pause_generation"])
def test_a_body_that_is_no_json_is_refused_by_every_reader(hurried: httpx.Client, path: str) -> None:
    for name, body in BODIES.items():
        answer = hurried.post(path, content=body, headers=JSON_HEADERS)
        assert answer.status_code in (400, 422), (name, answer.text)
        error_of(answer)


def test_of_a_key_that_is_there_twice_the_last_counts_and_is_checked(hurried: httpx.Client) -> None:
    twice = GOOD[:-1] + b', "num_inference_steps": 0}'
    answer = hurried.post("/generate", content=twice, headers=JSON_HEADERS)
    assert (answer.status_code, error_of(answer)["field"]) == (422, "num_inference_steps")
    assert hurried.post("/generate", content=b'{"prompt": 3, ' + GOOD[1:], headers=JSON_HEADERS).status_code == 200


@pytest.mark.parametrize(("opening", "inner", "closing"), [("[", "", "]"), ('{"a":', "1", "}")])
def test_what_a_second_key_of_the_same_name_hides_breaks_nothing(
    hurried: httpx.Client, opening: str, inner: str, closing: str
) -> None:
    """/verify_weights reads its body with two parsers; at a few depths the first still has stack, and the second has not."""
    for depth in range(900, 1000):
        hidden = opening * depth + inner + closing * depth
        body = f'{{"module": {hidden}, "module": "vae", "expected": {{"a": "b"}}}}'
        answer = hurried.post("/verify_weights", content=body, headers=JSON_HEADERS)
        assert answer.status_code in (400, 409), (depth, answer.text)
        error_of(answer)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x" * 1000])
@pytest.mark.parametrize("path", ["/generate", "/rollout/score", "/verify_weights"])
def test_no_body_is_unpacked(hurried: httpx.Client, path: str, coding: str) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    answer = hurried.post(path, content=bomb, headers={**JSON_HEADERS, "content-encoding": coding})
    assert (answer.status_code, error_of(answer)["field"]) == (415, "content-encoding")


def blob_of(shape: str) -> bytes:
    header = b'{"t": {"dtype": "F32", "shape": %s, "data_offsets": [0, 4]}}' % shape.encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


BLOBS = {
    "nothing": b"",
    "a length and no header": (10).to_bytes(8, "little"),
    "a length beyond all bytes": (2**64 - 1).to_bytes(8, "little") + b"{}",
    # Their product alone would take hours, in which no other thread runs.
    "a shape of a million dimensions": blob_of("[" + f"{2**62}," * 999_999 + "1]"),
    "a shape of huge numbers": blob_of("[" + "9" * 4000 + ",0]"),
    "a shape below zero": blob_of("[-1, -1]"),
    "an empty shape of impossible size": blob_of(f"[0, {2**63}]"),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "offsets that cross": safetensors_prefix({"t": torch.zeros(4)}).replace(b"[0,16]", b"[16,0]") + bytes(16),
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_tensor_that_is_none_is_refused(server: httpx.Client, name: str) -> None:
    tensor = {"__tensor__": True, "data": BLOBS[name], "shape": [1], "dtype": "torch.float32"}
    parts = {"steps": [0], "latents": tensor, "next_latents": tensor, "denoising_env": {"pos_cond_kwargs": {"a": tensor}}}
    body = msgspec.msgpack.encode({"samples": [{**parts, "sampling": {}}]})
    answer = server.post("/rollout/score", content=body, headers={"content-type": "application/msgpack"})
    assert answer.status_code == 422, answer.text
    error_of(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 9999,
        b"\x81\xa7samples\xdd\x7f\xff\xff\xff",
        b"\xd7\xff" + bytes(8),
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x81\x93\x01\x02\x03\x01",
    ],
)
def test_msgpack_that_is_none_is_refused(server: httpx.Client, body: bytes) -> None:
    answer = server.post("/rollout/score", content=body, headers={"content-type": "application/msgpack"})
    assert answer.status_code in (400, 422), answer.text
    error_of(answer)


@pytest.mark.parametrize("seconds", ["1e308", "1e18", "9" * 300])
def test_a_deadline_beyond_all_clocks_is_none(server: httpx.Client, seconds: str) -> None:
    for _ in range(2):
        answer = server.post("/generate", content=GOOD, headers={**JSON_HEADERS, "x-flowroll-deadline-s": seconds})
        assert answer.status_code == 200


def test_headers_that_choose_an_answer_may_hold_anything(hurried: httpx.Client) -> None:
    for value in (b"\xff", b"*/*;q=nan", b"," * 5000, b"a/b/c;;;=;q=", b"application/json;q=1e999", b"*", b"/"):
        for name in ("accept", "x-flowroll-dialect", "x-flowroll-deadline-s", "content-type", "x-request-id"):
            headers = [(b"content-type", b"application/json"), (name.encode(), value)]
            answer = hurried.post("/generate", content=GOOD, headers=headers[name == "content-type" :])
            assert answer.status_code in (200, 406, 415, 422), (name, value, answer.text)


def test_a_client_that_leaves_at_any_byte_leaves_no_trace(
    hurried: httpx.Client, service: EngineService, caplog: pytest.LogCaptureFixture
) -> None:
    whole = post(LENGTH, body=GOOD)
    for end in range(0, len(whole), 7):
        with connected(hurried) as connection:
            connection.sendall(whole[:end])
    assert hurried.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info], caplog.text
    assert threading.active_count() < 200


@contextlib.contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=WAIT_S) as connection:
        yield connection


def dribble(waiting: dict[socket.socket, tuple[str, bytes, bytearray]], answers: dict[str, bytes]) -> None:
    """Sends a little on every connection, and takes those out that the server has ended."""
    time.sleep(DRIBBLE_S)
    for connection in list(waiting):
        name, more, received = waiting[connection]
        try:
            connection.sendall(more)
            while select.select([connection], [], [], 0)[0]:
                piece = connection.recv(1 << 16)
                received += piece
                if not piece:
                    raise ConnectionResetError
        except ConnectionError:
            answers[name] = bytes(received)
            del waiting[connection]
