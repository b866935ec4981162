"""What a hostile server, or a broken proxy, can do to a client: nothing that lasts, and nothing that is taken for an answer."""

import asyncio
import dataclasses
import functools
import gzip
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
import torch
from tests.factories import make_image, make_rollout
from tests.unit.test_client import KINDS, answering, ask, sent_by

from flowroll.client import AsyncClient, Client
from flowroll.client.bounds import MAX_OBJECT_BYTES
from flowroll.errors import ServerConnectionError
from flowroll.types import Rollout
from flowroll.wire.codec import encode_images, encode_rollouts


def answer_of(samples: list[Any], wire_format: Any = "msgpack") -> Callable[[httpx.Request], httpx.Response]:
    encode = encode_rollouts if isinstance(samples[0], Rollout) else encode_images
    body = encode(samples, wire_format=wire_format)
    return answering(200, b"".join(body.chunks()), **{"content-type": body.content_type})


@pytest.mark.parametrize("kind", KINDS)
def test_no_compressed_answer_is_asked_for_or_unpacked(kind: str) -> None:
    assert sent_by(kind, "health").headers["accept-encoding"] == "identity"
    bomb = gzip.compress(bytes(50_000_000))

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=httpx.ByteStream(bomb), headers={"content-encoding": "gzip"})

    with pytest.raises(ServerConnectionError, match="must not be compressed, got content-encoding 'gzip'"):
        ask(kind, handler, "health")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("declared", [True, False])
def test_an_answer_has_a_bound_whether_it_says_its_length_or_not(kind: str, declared: bool) -> None:
    pieces = 0

    def handler(request: httpx.Request) -> httpx.Response:
        headers = {"content-length": str(10**30)} if declared else {}
        return httpx.Response(200, stream=Endless() if kind == "sync" else AsyncEndless(), headers=headers)

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal pieces
            while True:
                pieces += 1
                yield bytes(1 << 20)

    class AsyncEndless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            for piece in Endless():
                yield piece

    with pytest.raises(ServerConnectionError, match=f"at most {MAX_OBJECT_BYTES} bytes"):
        ask(kind, handler, "server_info")
    with pytest.raises(ServerConnectionError, match=r"at most 3000000 bytes.*raise max_answer_bytes"):
        ask(kind, handler, "rollout", "a cat", options={"max_answer_bytes": 3_000_000})
    assert pieces == 0 if declared else pieces <= 64 + 3 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_drips_is_given_up_after_the_total_time(kind: str) -> None:
    """Each byte comes in time; all of them never do."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n")
                for _ in range(250):
                    if ended.wait(0.02):
                        break
                    connection.sendall(b" ")

        server = threading.Thread(target=drip)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with pytest.raises(ServerConnectionError, match=r"over within 0\.3 s.*raise total_timeout_s"):
                ask(kind, url, "health", options={"timeout_s": 10.0, "total_timeout_s": 0.3})
        finally:
            ended.set()
            server.join()


def test_the_total_time_follows_from_the_timeout_unless_it_is_given() -> None:
    with Client("http://x", timeout_s=5) as client, Client("http://x", total_timeout_s=7) as other:
        assert (client._total_s, other._total_s) == (30, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_connections_are_not_shared_with_a_parent_process(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    async def run() -> None:
        client: Any = (Client if kind == "sync" else AsyncClient)("http://x", transport=httpx.MockTransport(answering(200, {})))
        for pid in (os.getpid(), os.getpid(), -1, -1):
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            answer = client.health()
            assert (answer if kind == "sync" else await answer) == {}
            opened.append(client._http)

    asyncio.run(run())
    assert opened[0] is opened[1] is not opened[2] is opened[3]


GROUP = [make_rollout(seed=seed, prompt="a cat", request_id="mine") for seed in (4, 5)]
ASKED = {"prompt": "a cat", "seed": 4, "num_outputs_per_prompt": 2, "request_id": "mine"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_one_to_what_was_asked(kind: str) -> None:
    assert len(ask(kind, answer_of(GROUP), "rollout", **ASKED)) == 2
    assert len(ask(kind, answer_of(GROUP), "rollout", prompt="a cat", seeds=[4, 5])) == 2
    assert len(ask(kind, answer_of(GROUP), "rollout", prompt="a cat", num_outputs_per_prompt=2)) == 2
    image = make_image(prompt="a cat", seed=9)
    assert len(ask(kind, answer_of([image]), "generate", prompt="a cat", seed=9)) == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": "a dog"}, "prompt"),
        ({"request_id": "yours"}, "request_id"),
        ({"num_outputs_per_prompt": 3}, "number of samples"),
        ({"seed": 5}, "seeds"),
        ({"seed": None, "seeds": [5, 4], "num_outputs_per_prompt": None}, "seeds"),
        ({"seed": None, "num_outputs_per_prompt": None}, "number of samples"),
    ],
)
@pytest.mark.parametrize("method", ["rollout", "generate"])
def test_an_answer_to_another_request_is_refused(method: str, asked: dict[str, Any], words: str) -> None:
    samples = GROUP if method == "rollout" else [make_image(seed=seed, prompt="a cat", request_id="mine") for seed in (4, 5)]
    values = {name: value for name, value in {**ASKED, **asked}.items() if value is not None}
    with pytest.raises(ServerConnectionError, match=f"must have the {words} that was asked for"):
        ask("sync", answer_of(samples), method, **values)


def test_samples_that_an_abort_left_out_are_not_missed() -> None:
    one, other = (make_rollout(seed=seed, prompt="a cat", request_id="mine", left_out=(1, 3)) for seed in (4, 6))
    asked = {**ASKED, "num_outputs_per_prompt": 4}
    assert [found.left_out for found in ask("sync", answer_of([one, other]), "rollout", **asked)] == [(1, 3), (1, 3)]
    for wrong, words in (([one], "number"), ([one, replace(other, left_out=(0, 1))], "left out"), ([other, one], "seeds")):
        with pytest.raises(ServerConnectionError, match=words):
            ask("sync", answer_of(wrong), "rollout", **asked)


def test_samples_of_two_requests_are_no_answer() -> None:
    mixed = [GROUP[0], dataclasses.replace(GROUP[1], request_id="another")]
    with pytest.raises(ServerConnectionError, match="request_id"):
        ask("sync", answer_of(mixed), "rollout", prompt="a cat", seed=4, num_outputs_per_prompt=2)


HOSTILE: dict[str, tuple[str, Any]] = {
    "an image of another size": ("image", torch.zeros(3, 1, 16, 48)),
    "an image of integers": ("image", torch.zeros(3, 1, 32, 48, dtype=torch.int64)),
    "log-probs of other steps": ("log_probs", torch.zeros(3)),
    "log-probs of integers": ("log_probs", torch.zeros(4, dtype=torch.int32)),
    "a step that is none": ("sde_step_indices", (0, 4)),
    "a step below none": ("sde_step_indices", (-1, 2)),
    "a step twice": ("sde_step_indices", (1, 1)),
    "debug tensors of other steps": ("debug_tensors.model_output", torch.zeros(1, 2, 3)),
    "a latent of no state": ("dit_trajectory.latent_step_indices", (0, 1, 2, 3, 9)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_values_that_no_server_sends_are_no_answer(name: str) -> None:
    sample: Any = make_rollout(seed=4, prompt="a cat")
    path, value = HOSTILE[name]
    *owners, field = path.split(".")
    owner = functools.reduce(getattr, owners, sample)
    # Past the checks of this side's own types.
    object.__setattr__(owner, field, value)
    for wire_format in ("json", "msgpack"):
        with pytest.raises(ServerConnectionError, match="the answer must hold rollouts"):
            ask("sync", answer_of([sample], wire_format), "rollout", "a cat", seed=4, options={"wire_format": wire_format})


def test_sizes_that_no_memory_holds_are_no_answer() -> None:
    body = b"".join(encode_rollouts([make_rollout(seed=4, prompt="a cat")], wire_format="msgpack").chunks())
    answer = msgspec.msgpack.decode(body)
    header = json.dumps({"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    answer[0]["rollout_log_probs"]["data"] = len(header).to_bytes(8, "little") + header + bytes(16)
    handler = answering(200, msgspec.msgpack.encode(answer), **{"content-type": "application/msgpack"})
    with pytest.raises(ServerConnectionError, match="all of its data"):
        ask("sync", handler, "rollout", "a cat", seed=4)


def test_no_server_has_a_client_wait_for_more_than_an_hour() -> None:
    from flowroll.client.exchange import retry_after_s

    assert [retry_after_s(text, 2.0) for text in ("1e300", "nan", "-1", "30", "soon")] == [3600.0, 2.0, 2.0, 30.0, 2.0]
