"""The process: what it does at the start, under load, and when it is told to stop."""

import asyncio
import contextlib
import errno
import logging
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.servers import LONG, SMALL, WAIT_S, Background, ServerProcess, error_of, until

from flowroll.logs import LineFormatter
from flowroll.serving import ServerConfig, launch, serve
from flowroll.serving.connections import quieten_accept_errors

NUM_PROBES = 40
# Loading takes seconds of CPU; what follows a signal must not.
STOP_S = 8.0


def running(client: httpx.Client) -> int:
    return client.get("/server_info").json()["queue"]["running"]


def test_probes_answer_within_100_ms_while_a_generation_runs_and_sigterm_ends_it_in_order(
    qwen_checkpoint: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with (
        ServerProcess(tmp_path / "log", model=str(qwen_checkpoint), host="0.0.0.0", grace_s=1.0) as server,
        server.client() as client,
    ):
        assert "0.0.0.0 is reachable from other machines and no api_key is set" in server.log
        long = Background(lambda: client.post("/rollout/generate", json={**LONG, "height": 256, "width": 256}))
        until(lambda: running(client) == 1)
        # The promise is 100 ms for every probe. On a shared machine a single one can wait for a CPU longer than that, which
        # says nothing about the server, so the test holds the median to it and reports the slowest.
        seconds = [
            _timed(client, path) for _ in range(NUM_PROBES // 4) for path in ("/health", "/readiness", "/liveness", "/metrics")
        ]
        record_property("slowest_probe_ms", round(max(seconds) * 1000, 1))
        assert statistics.median(seconds) < 0.1
        assert client.get("/health_generate").json()["evidence"] == "running"
        assert running(client) == 1

        server.stop(signal.SIGTERM)
        stopped_s = time.monotonic()
        until(lambda: client.get("/readiness").status_code == 503)
        refused = client.post("/rollout/generate", json=SMALL)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        interrupted = long.answer()
        assert (interrupted.status_code, error_of(interrupted)["code"]) == (503, "shutting_down")
        assert server.process.wait(WAIT_S) == 0
        assert time.monotonic() - stopped_s < STOP_S
    log = server.log
    assert "Traceback" not in log
    assert log.rstrip().endswith("stopped")
    assert (
        log.count("configuration:\n") == 1
        and re.search(r"^  device +cpu$", log, re.MULTILINE)
        and max(map(len, log.split("\n"))) < 300
    )
    assert log.count("memory: transformer ") == 1 and "activations of a forward of " in log
    assert _access_lines(log, "/rollout/generate")[0].count("status=503") == 1
    assert "/health" not in log


def test_accepted_requests_finish_within_the_grace_period_and_ctrl_c_returns_leaving_no_thread(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = {**SMALL, "num_inference_steps": 100, "rollout_debug_mode": False}

    def act(client: httpx.Client) -> None:
        client.post("/generate", json={**SMALL, "suppress_logs": True})
        client.post("/generate", json={**SMALL, "request_id": "forged\nline"})
        client.get("/forged%0Apath")
        requests = [Background(lambda: client.post("/rollout/generate", json=body)) for _ in range(2)]
        until(lambda: client.get("/server_info").json()["queue"]["accepted"] == 4)
        os.kill(os.getpid(), signal.SIGINT)
        assert [request.answer().status_code for request in requests] == [200, 200]

    threads = set(threading.enumerate())
    _serve_here(act, monkeypatch, caplog, model=str(z_image_checkpoint), variant="turbo", grace_s=WAIT_S)
    # tqdm, with which diffusers shows that it loads, keeps one thread for all of its bars.
    until(lambda: {type(thread).__name__ for thread in set(threading.enumerate()) - threads} <= {"TMonitor"})
    (line,) = _access_lines(caplog.text, "/generate")
    assert "request_id=forged%0Aline" in line and "status=200" in line and "duration_ms=" in line
    assert len(_access_lines(caplog.text, "/rollout/generate")) == 2
    assert len(_access_lines(caplog.text, "/forged%0Apath")) == 1


@pytest.mark.slow
def test_a_second_signal_cuts_the_grace_period_short(
    qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_s = []

    def act(client: httpx.Client) -> None:
        long = Background(lambda: client.post("/rollout/generate", json=LONG))
        until(lambda: running(client) == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: "stopping" in caplog.text)
        assert running(client) == 1
        stopped_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        assert long.answer().status_code == 503

    _serve_here(act, monkeypatch, caplog, model=str(qwen_checkpoint), grace_s=20.0)
    assert time.monotonic() - stopped_s[0] < STOP_S


@pytest.mark.slow
def test_neither_a_stopped_engine_nor_a_join_to_a_silent_port_keeps_the_process_from_its_end(
    z_image_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), grace_s=0.5) as server,
        server.client() as client,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        place = {"master_address": "127.0.0.1", "master_port": silent.getsockname()[1], "rank_offset": 1, "world_size": 2}
        threading.Thread(target=_post_quietly, args=(client, "/init_weights_update_group", place), daemon=True).start()
        silent.accept()
        (engine,) = map(int, Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split())
        os.kill(engine, signal.SIGSTOP)
        server.stop(signal.SIGTERM)
        stopped_s = time.monotonic()
        server.process.wait(WAIT_S)
        assert time.monotonic() - stopped_s < 0.5 + launch._END_S + 1.0
        until(lambda: not Path(f"/proc/{engine}").exists())


def test_threads_that_remain_are_ended_with_the_process(tmp_path: Path) -> None:
    code = (
        "import threading, time; from flowroll.serving.launch import _LastResort\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "_LastResort().arm(0.2)"
    )
    started_s = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S)
    assert ended.returncode == 1 and time.monotonic() - started_s < 30


def test_a_truncated_checkpoint_ends_the_process_with_one_clear_line_and_nothing_listens(
    qwen_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(qwen_checkpoint, broken)
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    port = _free_port()
    with ServerProcess(tmp_path / "log", model=str(broken), port=port) as server:
        while server.process.poll() is None:
            assert not _listens(port)
            time.sleep(0.05)
        assert server.process.returncode == 1
    assert not _listens(port)
    errors = [line for line in server.log.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and str(weights) in errors[0] and "truncated" in errors[0]
    assert "Traceback" not in server.log


def test_a_signal_while_the_checkpoint_loads_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(process: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("loading went on")

    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    monkeypatch.setattr(launch.EngineProcess, "wait", wait)
    with pytest.raises(SystemExit) as exited:
        serve(ServerConfig(model="x"))
    assert exited.value.code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder must be a diffusers checkpoint folder"),
        pytest.param({"variant": "mega"}, "variant must be one of", marks=pytest.mark.slow),
        pytest.param({"dtype": "float8"}, "dtype must be one of", marks=pytest.mark.slow),
        pytest.param({"device": "warp"}, "device must", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_loaded_exits_with_one_line_before_the_port_is_bound(
    qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], words: str
) -> None:
    def bind(config: ServerConfig) -> socket.socket:
        raise AssertionError("the port was bound")

    monkeypatch.setattr(launch, "open_listener", bind)
    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    handlers = [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as exited:
        serve(ServerConfig(**{"model": str(qwen_checkpoint), "device": "cpu", **options}))
    # What `SystemExit` holds is printed, and the status is 1.
    assert isinstance(exited.value.code, str)
    assert words in exited.value.code and "\n" not in exited.value.code
    assert [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_connections_may_not_use_up_the_descriptors_that_answers_need(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with pytest.raises(SystemExit):
            serve(ServerConfig(model=str(tmp_path), max_connections=500))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_the_system_allows_few_files_there_are_fewer_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    for hard, connections in ((4096, 1000), (1500, 750), (200, 100)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (100, hard))
        assert launch._with_descriptors(ServerConfig(model="x")).max_connections == connections
    assert "200 open files allow 100 connections, not 1000" in caplog.text


def test_connections_that_find_no_descriptor_are_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio logged a traceback for each: 137,000 in 45 s."""

    async def fail() -> None:
        loop = asyncio.get_running_loop()
        quieten_accept_errors(loop)
        for _ in range(1000):
            error = OSError(errno.EMFILE, "Too many open files")
            loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error, "socket": 1})
        loop.call_exception_handler({"message": "something else", "exception": ValueError("odd")})

    asyncio.run(fail())
    assert [record.getMessage() for record in caplog.records] == [
        "connections cannot be accepted: Too many open files (1 attempts); allow more open files",
        "something else",
    ]


def test_a_port_that_is_taken_exits_with_one_line(qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"127.0.0.1:{port} must be free"):
            serve(ServerConfig(model=str(qwen_checkpoint), device="cpu", port=port))


def _serve_here(
    act: Callable[[httpx.Client], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **options: Any
) -> None:
    """Serves in this process, whose main thread has to be the server's, while `act` is the client and ends it."""
    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    caplog.set_level(logging.INFO, logger="flowroll")
    caplog.handler.setFormatter(LineFormatter("text"))
    failures: list[BaseException] = []

    def client_thread() -> None:
        try:
            until(lambda: "listening on" in caplog.text)
            url = re.findall(r"listening on (http://\S+)", caplog.text)[0]
            with httpx.Client(base_url=url, timeout=WAIT_S) as client:
                act(client)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client_thread)
    thread.start()
    serve(ServerConfig(**{"port": 0, "device": "cpu", **options}))
    thread.join(WAIT_S)
    if failures:
        raise failures[0]


def _post_quietly(client: httpx.Client, path: str, body: Any) -> None:
    with contextlib.suppress(httpx.HTTPError):
        client.post(path, json={**body, "backend": "gloo"})


def _timed(client: httpx.Client, path: str) -> float:
    started = time.perf_counter()
    assert client.get(path).status_code == 200
    return time.perf_counter() - started


def _access_lines(log: str, path: str) -> list[str]:
    return [line for line in log.splitlines() if "flowroll.access" in line and f"path={path} " in line]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
