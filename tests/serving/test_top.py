"""`flowroll top` and a real server."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx
from tests.scripted import scripted_server
from tests.serving.servers import SMALL, WAIT_S, serving, until
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll.engine.service import EngineService

ONCE = ("--once", "--interval-s", "0.1")


def test_one_frame_of_a_server_goes_to_a_pipe(server: httpx.Client, service: EngineService) -> None:
    assert server.post("/generate", json=SMALL).status_code == 200
    result = run_cli("top", "--url", server.base_url, *ONCE, columns=110)
    assert result.exit_code == 0 and "\x1b" not in result.stdout
    for shown in (
        Path(service.engine.info.model).name,
        "● ready",
        "running samples",
        "per second",
        "time by stage",
        " done",
    ):
        assert shown in result.stdout, result.stdout


def test_a_guarded_server_wants_its_token(service: EngineService) -> None:
    with serving(service, api_key="secret") as client:
        assert_one_line_error(run_cli("top", "--url", client.base_url, *ONCE), "token")
        assert run_cli("top", "--url", client.base_url, "--api-key", "secret", *ONCE).exit_code == 0


def test_it_outlives_a_restart_but_not_the_loss_of_its_token(server: httpx.Client) -> None:
    info, metrics = server.get("/server_info").text, server.get("/metrics").text
    stopping = {"error": {"code": "shutting_down", "message": "the server stops", "field": None}}
    lost = {"error": {"code": "unauthorized", "message": "send the token", "field": None}}
    bodies, asked = ((200, info), (200, metrics), (503, stopping), (200, info), (200, metrics), (401, lost)), list[str]()
    with scripted_server([(status, {}, body) for status, body in bodies], asked) as url:
        result = run_cli("top", "--url", url, "--interval-s", "0.1")
    assert_one_line_error(result, "token")
    assert asked == ["/server_info", "/metrics", "/server_info", "/server_info", "/metrics", "/server_info"]
    # The last picture is of the look after the restart.
    assert "● ready" in result.stdout


def test_the_last_numbers_stay_when_a_server_is_gone_and_ctrl_c_ends_it(server: httpx.Client) -> None:
    looks, asked = [(200, {}, server.get(path).text) for path in ("/server_info", "/metrics")], list[str]()
    with scripted_server(looks, asked) as url:
        command = [sys.executable, "-m", "flowroll", "top", "--url", url, "--interval-s", "0.1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # The third look and those after it are broken off.
        until(lambda: len(asked) >= 4)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_S)
    assert (process.returncode, stderr) == (0, "")
    assert "● no answer for 0 s" in stdout and "running samples" in stdout


def test_another_kind_of_server_is_told_apart() -> None:
    for metrics in ("up 1\n", "<html>"):
        with scripted_server([(200, {}, "{}"), (200, {}, metrics)], []) as url:
            assert_one_line_error(run_cli("top", "--url", url, *ONCE), "must be a flowroll server")
