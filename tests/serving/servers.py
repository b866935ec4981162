"""Servers for the tests: in a thread of this process, or as the process that users start."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from tests.hooked import WAIT_S, Gate, HookedEngine

from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.serving import ServerConfig, create_app
from flowroll.serving.connections import HttpConfig, open_listener

__all__ = [
    "LONG",
    "SMALL",
    "WAIT_S",
    "Background",
    "Gate",
    "HookedEngine",
    "ServerProcess",
    "error_of",
    "serving",
    "until",
]

# A server and its ranks import for seconds, and for much longer where other work has the cores.
START_S = 240.0
# A small and quick request of either family.
SMALL: dict[str, Any] = {"prompt": "a red fox in snow", "seed": 7, "height": 64, "width": 64, "num_inference_steps": 2}
# Minutes of work on any machine, in steps of a millisecond.
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 1000, "num_outputs_per_prompt": 64, "rollout_debug_mode": False}


@contextmanager
def serving(service: EngineService, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server over this service, on a thread. The service lives on."""
    config = ServerConfig(model=service.engine.info.model, port=0, **options)
    listener = open_listener(config)
    server = uvicorn.Server(HttpConfig(create_app(InProcessEngine(service), config), config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=WAIT_S) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


class ServerProcess:
    """`serve(ServerConfig(...))` in a process of its own, its log in a file.

    Args:
        log: Path of the log file.
        options: Fields of `ServerConfig`; the layout by its name.
    """

    def __init__(self, log: Path, **options: Any) -> None:
        self._log = log
        code = (
            "import json, sys; from flowroll.serving import ServerConfig, serve; from flowroll.types import Layout; "
            "options = json.loads(sys.argv[1]); options['layout'] = Layout.parse(options.get('layout', 'single')); "
            "serve(ServerConfig(**options))"
        )
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps({"port": 0, "device": "cpu", **options})],
                stderr=stderr,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def client(self) -> httpx.Client:
        """A client, once the server listens."""
        found: list[str] = []

        def listens() -> bool:
            assert self.process.poll() is None, self.log
            found[:] = re.findall(r"listening on (http://[^\s\"]+)", self.log)
            return bool(found)

        until(listens, START_S)
        return httpx.Client(base_url=found[0], timeout=WAIT_S)

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal; does not wait."""
        self.process.send_signal(sig)


class Background:
    """A request on a thread of its own."""

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        self._answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, args=(send,))
        self._thread.start()

    def _run(self, send: Callable[[], httpx.Response]) -> None:
        self._answer = send()

    def answer(self) -> httpx.Response:
        self._thread.join(WAIT_S)
        assert self._answer is not None
        return self._answer


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in the body, which holds nothing else."""
    body = response.json()
    assert body.keys() == {"error"}, body
    assert body["error"].keys() == {"code", "message", "field"}, body
    assert "Traceback" not in response.text
    return body["error"]


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the one answer, after which the server ends the connection; a hang is a timeout."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            received += piece
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return int(head.split()[1]), body[: int(length[1]) if length else None]


def until(condition: Callable[[], bool], limit_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
