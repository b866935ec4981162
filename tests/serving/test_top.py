"""`flowroll top` and a real server."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from tests.serving.servers import SMALL, serving
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll.cli import top
from flowroll.engine.worker import EngineWorker
from flowroll.errors import ShuttingDownError, UnauthorizedError

ONCE = ("--once", "--interval-s", "0.1")


def test_one_frame_of_a_server_goes_to_a_pipe(server: httpx.Client, worker: EngineWorker) -> None:
    assert server.post("/generate", json=SMALL).status_code == 200
    result = run_cli("top", "--url", server.base_url, *ONCE, columns=110)
    assert result.exit_code == 0 and "\x1b" not in result.stdout
    for shown in (
        Path(worker.engine.info.model).name,
        "● ready",
        "running samples",
        "per second",
        "time by stage",
        " done",
    ):
        assert shown in result.stdout, result.stdout


def test_a_guarded_server_wants_its_token(worker: EngineWorker) -> None:
    with serving(worker, api_key="secret") as client:
        assert_one_line_error(run_cli("top", "--url", client.base_url, *ONCE), "token")
        assert run_cli("top", "--url", client.base_url, "--api-key", "secret", *ONCE).exit_code == 0


def test_it_goes_on_when_a_server_stops_to_answer_and_ends_at_ctrl_c(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = top._View.look

    def failing(view: top._View) -> None:
        looks.append(None)
        if len(looks) == 3:
            raise KeyboardInterrupt
        if len(looks) == 2:
            # As of a server that is gone.
            view._client._http.base_url = httpx.URL("http://127.0.0.1:9")
        look(view)

    monkeypatch.setattr(top._View, "look", failing)
    result = run_cli("top", "--url", server.base_url, "--interval-s", "0.1")
    assert result.exit_code == 0 and len(looks) == 3
    assert "no answer" in result.stdout


def test_it_outlives_a_restart_but_not_the_loss_of_its_token(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    look, raised = top._View.look, list[BaseException | None]()

    def failing(view: top._View) -> None:
        if (error := raised.pop(0)) is not None:
            raise error
        look(view)

    monkeypatch.setattr(top._View, "look", failing)
    watch = ("top", "--url", server.base_url, "--interval-s", "0.1")
    raised[:] = [None, ShuttingDownError("the server must run, got a shutdown; wait."), None, KeyboardInterrupt()]
    result = run_cli(*watch)
    assert result.exit_code == 0 and not raised
    raised[:] = [None, UnauthorizedError("the request must carry the server's token, got another; send it."), None]
    assert_one_line_error(run_cli(*watch), "token")
    assert len(raised) == 1


def test_another_kind_of_server_is_told_apart() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}" if self.path == "/server_info" else b"up 1\n")

        def log_message(self, *_: object) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{other.server_address[1]}"
        assert_one_line_error(run_cli("top", "--url", url, *ONCE), "must be a flowroll server")
    finally:
        other.shutdown()
        other.server_close()
