"""Answers that are not read: bounded together, counted, and given up where their client is too slow."""

import json
import re
import socket
import threading
import time

import httpx
import pytest
import torch
from tests.hooked import WAIT_S, Gate, HookedEngine
from tests.serving.servers import SMALL, error_of, serving, until
from tests.serving.test_hostile import post
from tests.serving.test_slow_readers import LARGE

from flowroll.client import Client
from flowroll.engine.plan import plan_request
from flowroll.engine.service import EngineService
from flowroll.errors import QueueFullError
from flowroll.serving.unsent import AnswerMemory, SendPatience
from flowroll.wire.schema import RolloutRequest, parse


def gauge(client: httpx.Client, name: str) -> float:
    (value,) = re.findall(rf"^flowroll_{name}_answer_bytes (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(value)


def half_read(client: httpx.Client) -> socket.socket:
    """A connection on which a large answer has begun, and nothing is read."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((client.base_url.host, client.base_url.port))
    body = json.dumps(LARGE).encode()
    reader.sendall(post(b"Content-Length: %d" % len(body), body=body, path=b"/rollout/generate"))
    assert reader.recv(12) == b"HTTP/1.1 200"
    return reader


def answer_bytes(service: EngineService, **fields: object) -> int:
    facts = service.facts()
    return plan_request(parse(RolloutRequest, {**fields}).to_params(), facts.model, facts.info.limits).answer_bytes


def test_beyond_the_bound_on_unsent_answers_nothing_is_accepted_until_one_is_read_or_given_up(service: EngineService) -> None:
    large = answer_bytes(service, **LARGE)
    with serving(service, max_unsent_bytes=large + 1) as client:
        with half_read(client):
            before = service.status().counts.accepted
            assert gauge(client, "unsent") >= large and gauge(client, "expected") == 0
            refused = client.post("/rollout/generate", json=SMALL)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 5
            assert client.post("/generate", json=SMALL).status_code == 429
            assert service.status().counts.accepted == before
        until(lambda: gauge(client, "unsent") == 0)
        assert client.post("/rollout/generate", json=SMALL).status_code == 200
        # Of a whole image, too, nothing is left.
        assert client.post("/generate", json=SMALL, headers={"accept": "image/png"}).status_code == 200
        until(lambda: gauge(client, "unsent") == gauge(client, "expected") == 0)


def test_what_waiting_requests_have_brought_counts(hooked: HookedEngine) -> None:
    """Their tensors are in the server's memory until they are answered, in both of its processes."""
    hooked.hook = gate = Gate()
    body = {name: value for name, value in SMALL.items() if name != "prompt"}
    embeds = torch.ones(300, hooked._model.spec.widths["text"])
    with EngineService(hooked, max_queue=4) as service:
        expected = answer_bytes(service, **SMALL)
        for name, tensors in {"prompt_embeds": {"prompt_embeds": embeds}, "latents": {"latents": torch.ones(16, 64)}}.items():
            given = body if name == "prompt_embeds" else SMALL
            size = expected + 2 * tensors[name].nbytes
            with serving(service, max_unsent_bytes=2 * size - 1) as client:
                trainer = Client(str(client.base_url))
                gate.entered.clear()
                gate.opened.clear()
                waiting = threading.Thread(target=lambda: trainer.rollout(**given, **tensors, debug_mode=True))  # noqa: B023
                waiting.start()
                assert gate.entered.wait(WAIT_S)
                assert gauge(client, "expected") == size
                with pytest.raises(QueueFullError):
                    Client(str(client.base_url)).rollout(**given, **tensors, debug_mode=True)
                gate.opened.set()
                waiting.join(WAIT_S)
                until(lambda: gauge(client, "unsent") == gauge(client, "expected") == 0)


def test_a_client_that_drips_its_answer_is_let_go(service: EngineService) -> None:
    """It takes a little all along, so that no bound on silence ends it."""
    with serving(service, send_timeout_s=0.3, min_send_bytes_per_s=2**24) as client, half_read(client) as reader:
        size = len(client.post("/rollout/generate", json=LARGE).content)
        taken = 0
        reader.settimeout(30)
        with pytest.raises(ConnectionError):
            while True:
                piece = reader.recv(1024)
                if not piece:
                    raise ConnectionResetError
                taken += len(piece)
                time.sleep(0.005 if gauge(client, "unsent") else 0)
        assert taken < size / 2
        until(lambda: gauge(client, "unsent") == 0)


def test_the_memory_of_answers_balances() -> None:
    memory = AnswerMemory(100)
    first = memory.admit(500)  # alone, whatever it takes
    with pytest.raises(QueueFullError):
        memory.admit(1)
    first.release()
    first, second = memory.admit(60), memory.admit(40)
    first.made(90)
    assert (memory.expected_bytes, memory.unsent_bytes) == (40, 90)
    second.release()
    with pytest.raises(QueueFullError):
        memory.admit(11)
    third = memory.admit(10)
    for answer in (first, second, third, first):
        answer.release()
    assert (memory.expected_bytes, memory.unsent_bytes) == (0, 0)


def test_patience_grows_with_what_is_taken_and_shrinks_with_the_wait() -> None:
    patience = SendPatience(2.0, 100)
    patience.waited(1.5)
    patience.sent(100)
    assert patience.left_s == 1.5
    patience.waited(2.0)
    assert patience.left_s == -0.5
