"""A `flowroll serve` process for the length of a `with` block."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

_STARTUP_LIMIT_S = 60.0
_STOP_LIMIT_S = 15.0
# Models this small are fastest on one thread, and much faster where other programs want the same cores.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def exit_on_sigterm() -> None:
    """Makes SIGTERM an ordinary exit of this process, so that a server that it started goes with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@dataclass(slots=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        url: Where it answers.
        pid: Of its process.
        startup_s: Seconds until it was ready.
        stop_s: Seconds from SIGTERM to its exit; set when the block ends.
    """

    url: str
    pid: int
    startup_s: float
    stop_s: float = 0.0


@contextlib.contextmanager
def running_server(checkpoint: Path, log: Path, *options: str, command: str = "serve") -> Iterator[Server]:
    """Serves a checkpoint on a free port; the block starts when the server is ready.

    Leaving the block sends SIGTERM and checks that the server exits with status 0. Whatever fails, no server is left behind.

    Args:
        checkpoint: What to serve.
        log: Takes the server's output.
        *options: Further ones of the command.
        command: "serve", or "cluster" for several replicas.

    Raises:
        RuntimeError: The server did not get ready, or did not stop as it should; with the end of its log.
    """
    port = free_port()
    arguments = [str(Path(sys.executable).with_name("flowroll")), command, str(checkpoint), "--port", str(port), *options]
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **_ENVIRONMENT})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, log)
        server = Server(url=url, pid=process.pid, startup_s=time.perf_counter() - started)
        yield server
        stopping = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the server did not stop within {_STOP_LIMIT_S:g} s of SIGTERM\n{_tail(log)}") from error
        if status != 0:
            raise RuntimeError(f"the server exited with status {status} after SIGTERM\n{_tail(log)}")
        server.stop_s = time.perf_counter() - stopping
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, limit_s: float = _STARTUP_LIMIT_S) -> None:
    """Waits until a server takes requests.

    Raises:
        RuntimeError: It has ended, or takes too long; with the end of its log.
    """
    deadline = time.monotonic() + limit_s
    # One client: each loads the system's certificates anew, which takes more than the question.
    with httpx.Client(base_url=url, timeout=2.0) as http:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server exited with status {process.returncode} before it was ready\n{_tail(log)}")
            with contextlib.suppress(httpx.TransportError):
                if http.get("/readiness").status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {limit_s:g} s\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
