"""Clients that are gone before their request is looked at cost nobody a place."""

import contextlib
import re
import threading

import httpx
import pytest
from tests.serving.servers import SMALL, WAIT_S, serving, until
from tests.serving.test_hostile import GOOD, LENGTH, connected, post

from flowroll.engine.service import EngineService
from flowroll.serving import parsing, state


def test_requests_of_clients_that_are_gone_are_neither_planned_nor_queued(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of them kept most places of a queue for half a minute."""
    planned: list[bytes] = []
    opened = threading.Event()
    plan = parsing._plan

    def slow_plan(*arguments: object) -> object:
        planned.append(b"")
        assert opened.wait(WAIT_S)
        return plan(*arguments)

    monkeypatch.setattr(parsing, "_plan", slow_plan)
    with serving(service) as client, contextlib.ExitStack() as stack:
        for _ in range(state._NUM_PLANNED):
            stack.enter_context(connected(client)).sendall(post(LENGTH, body=GOOD))
        until(lambda: len(planned) == state._NUM_PLANNED)
        before = service.status().counts.accepted
        for _ in range(20):
            with connected(client) as dead:
                dead.sendall(post(LENGTH, body=GOOD))
        # Those that are planned go as well, before they are queued.
        stack.close()
        until(lambda: num_connections(client) == 0)
        opened.set()
        until(lambda: dropped(client) == 20 + state._NUM_PLANNED)
        assert len(planned) == state._NUM_PLANNED and service.status().counts.accepted == before
        assert client.post("/generate", json=SMALL).status_code == 200


def dropped(client: httpx.Client) -> float:
    return float(re.findall(r"^flowroll_dropped_requests_total (\S+)$", client.get("/metrics").text, re.MULTILINE)[0])


def num_connections(client: httpx.Client) -> int:
    """Of this process to the server, as the server sees them: those that are gone have been noticed."""
    port = client.base_url.port
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    ours = f":{port:04X}"
    # 01: established, 08: the other end is gone and this one has not noticed.
    return sum(row[1].endswith(ours) and row[3] in ("01", "08") for row in rows)
