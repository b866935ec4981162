"""The log: every line of a request carries its id, none a prompt or a token."""

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.servers import SMALL, HookedEngine, serving, until

from flowroll.engine.service import EngineService
from flowroll.logs import LogFormat, LogLevel, configure_logging
from flowroll.wire.body import EncodedBody

ROLLOUT = "/rollout/generate"
SECRET, TOKEN = "a very secret prompt", "token-of-the-server"


class Log:
    """What a server of this process writes to standard error."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def about(self, request_id: str) -> list[dict[str, Any]]:
        # The servers of the tests have uvicorn's own access log, which is off otherwise.
        entries = [entry for entry in map(json.loads, self.lines) if entry["logger"] != "uvicorn.access"]
        return [entry for entry in entries if request_id in [entry.get("request_id"), *entry.get("request_ids", ())]]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[LogLevel, LogFormat], Log]]:
    """Configures logging as a server does; afterwards it is as before."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in ("", "flowroll", "uvicorn", "uvicorn.error")]
    levels = [logger.level for logger in loggers]
    # pytest's own handlers stay out of it.
    monkeypatch.setattr(root, "handlers", [])

    def configure(level: LogLevel, log_format: LogFormat) -> Log:
        log = Log()
        monkeypatch.setattr(sys, "stderr", log.stream)
        configure_logging(level, log_format)
        return log

    yield configure
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def log(configured: Callable[[LogLevel, LogFormat], Log]) -> Log:
    return configured("debug", "json")


def test_every_line_of_a_request_carries_its_id_and_none_its_prompt(
    qwen_checkpoint: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("no device")

    with (
        HookedEngine(qwen_checkpoint, device="cpu") as engine,
        EngineService(engine, max_queue=1) as service,
        serving(service, api_key=TOKEN) as client,
    ):
        client.headers["authorization"] = f"Bearer {TOKEN}"
        body = {**SMALL, "prompt": SECRET}
        assert client.post(ROLLOUT, json={**body, "request_id": "good\n1"}).status_code == 200
        assert client.post(ROLLOUT, json={**body, "request_id": "bad", "height": 100}).status_code == 422
        assert client.post(ROLLOUT, json=body, headers={"authorization": "Bearer other"}).status_code == 401
        assert client.post(ROLLOUT, json={**body, "request_id": "quiet", "suppress_logs": True}).status_code == 200
        engine.hook = fail
        assert client.post(ROLLOUT, json={**body, "request_id": "failed"}).status_code == 500
        engine.hook = HookedEngine.hook
        # A defect of the server's own, on a thread.
        monkeypatch.setattr("flowroll.serving.routers.rollout.encode_rollouts", fail)
        broken = client.post(ROLLOUT, json={**body, "request_id": "broken"})
        assert broken.status_code == 500 and broken.headers["x-request-id"] == "broken"
    (good,) = log.about("good\n1")
    assert (good["logger"], good["status"], good["method"], good["path"]) == ("flowroll.access", 200, "POST", ROLLOUT)
    assert good["bytes"] > 0 and good["duration_ms"] >= good["denoise_ms"] > 0 and "error" not in good
    (bad,) = log.about("bad")
    assert (bad["status"], bad["error"]) == (422, "invalid_request") and "denoise_ms" not in bad
    assert log.about("quiet") == []
    failed = log.about("failed")
    assert {entry["logger"] for entry in failed} == {"flowroll.engine.scheduler.queue", "flowroll.access"}
    assert any("RuntimeError: no device" in entry.get("exception", "") for entry in failed)
    assert {entry["logger"] for entry in log.about("broken")} >= {"flowroll.serving.middleware", "flowroll.access"}
    everything = log.stream.getvalue()
    assert "status" in everything and SECRET not in everything and TOKEN not in everything


def test_a_body_that_breaks_off_in_the_http_library_is_logged_with_the_request_s_id(
    service: EngineService, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(body: EncodedBody) -> Iterator[bytes]:
        yield b"["
        raise RuntimeError("no more")

    monkeypatch.setattr(EncodedBody, "chunks", breaking)
    with serving(service) as client, pytest.raises(httpx.RemoteProtocolError):
        client.post(ROLLOUT, json={**SMALL, "request_id": "cut"})
    until(lambda: any(entry["logger"] == "uvicorn.error" for entry in log.about("cut")))


def test_a_forward_that_fails_for_several_requests_names_them_all(configured: Callable[[LogLevel, LogFormat], Log]) -> None:
    log, steps = configured("info", "json"), logging.getLogger("flowroll.engine.scheduler.loop")
    steps.warning("a forward failed", extra={"request_ids": ["a", "b c"]})
    assert log.about("b c") == log.about("a") != []
    log = configured("info", "text")
    steps.warning("a forward failed", extra={"request_ids": ["a", "b c"]})
    (line,) = log.lines
    assert line.endswith(" WARNING flowroll.engine.scheduler.loop a forward failed request_ids=a,b%20c")


def test_no_value_forges_a_line_or_another_value(configured: Callable[[LogLevel, LogFormat], Log]) -> None:
    values = {"request_id": "x\n2026 ERROR y", "path": "/a b=c", "status": 200}
    access, time = logging.getLogger("flowroll.access"), r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
    log = configured("info", "text")
    access.info("answered", extra=values)
    (line,) = log.lines
    shown = "INFO flowroll.access answered request_id=x%0A2026%20ERROR%20y path=/a%20b%3Dc status=200"
    assert re.fullmatch(f"{time} {shown}", line)
    log = configured("info", "json")
    access.info("answered", extra=values)
    (line,) = log.lines
    entry = json.loads(line)
    assert re.fullmatch(time, entry.pop("time"))
    assert entry == {"level": "info", "logger": "flowroll.access", "message": "answered", **values}


def test_a_traceback_has_lines_of_its_own_in_text_and_none_in_json(configured: Callable[[LogLevel, LogFormat], Log]) -> None:
    for log_format in ("text", "json"):
        log = configured("info", log_format)
        try:
            raise RuntimeError("no device")
        except RuntimeError:
            logging.getLogger("flowroll").exception("failed\nhere", extra={"request_id": "a"})
        if log_format == "json":
            (line,) = log.lines
            assert json.loads(line)["message"] == "failed\nhere" and "RuntimeError: no device" in json.loads(line)["exception"]
        else:
            assert "here request_id=a" in log.lines and log.lines[-1] == "RuntimeError: no device"


def test_the_level_is_that_of_flowroll_and_other_libraries_are_only_heard_when_they_warn(
    configured: Callable[[LogLevel, LogFormat], Log],
) -> None:
    configured("debug", "json")
    # A second configuration takes the place of the first.
    log = configured("info", "text")
    for name in ("flowroll.serving", "uvicorn.error", "httpx"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "said")
    heard = [line.split()[1:3] for line in log.lines]
    assert heard == [
        ["INFO", "flowroll.serving"],
        ["WARNING", "flowroll.serving"],
        ["WARNING", "uvicorn.error"],
        ["WARNING", "httpx"],
    ]
