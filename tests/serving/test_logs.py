"""The log: every line of a request carries its id, none a prompt or a token."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.servers import SMALL, HookedEngine, serving, until

from flowroll.engine.worker import EngineWorker
from flowroll.serving.logs import JsonFormatter, RequestIdFilter, TextFormatter, configure_logging
from flowroll.wire.body import EncodedBody

ROLLOUT = "/rollout/generate"
SECRET, TOKEN = "a very secret prompt", "token-of-the-server"


class Lines(logging.Handler):
    """Keeps what the server's handler would write."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.addFilter(RequestIdFilter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def about(self, request_id: str) -> list[dict[str, Any]]:
        # The servers of the tests have uvicorn's own access log, which is off otherwise.
        entries = [entry for entry in map(json.loads, self.lines) if entry["logger"] != "uvicorn.access"]
        return [entry for entry in entries if request_id in [entry.get("request_id"), *entry.get("request_ids", ())]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines(JsonFormatter())
    loggers = [logging.getLogger(name) for name in ("flowroll", "uvicorn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_every_line_of_a_request_carries_its_id_and_none_its_prompt(
    qwen_checkpoint: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("no device")

    with (
        HookedEngine(qwen_checkpoint, device="cpu") as engine,
        EngineWorker(engine, max_queue=1) as worker,
        serving(worker, api_key=TOKEN) as client,
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
    (good,) = lines.about("good\n1")
    assert (good["logger"], good["status"], good["method"], good["path"]) == ("flowroll.access", 200, "POST", ROLLOUT)
    assert good["bytes"] > 0 and good["duration_ms"] >= good["denoise_ms"] > 0 and "error" not in good
    (bad,) = lines.about("bad")
    assert (bad["status"], bad["error"]) == (422, "invalid_request") and "denoise_ms" not in bad
    assert lines.about("quiet") == []
    failed = lines.about("failed")
    assert {entry["logger"] for entry in failed} == {"flowroll.engine.scheduler.queue", "flowroll.access"}
    assert any("RuntimeError: no device" in entry.get("exception", "") for entry in failed)
    assert {entry["logger"] for entry in lines.about("broken")} >= {"flowroll.serving.middleware", "flowroll.access"}
    everything = "\n".join(lines.lines)
    assert "status" in everything and SECRET not in everything and TOKEN not in everything


def test_a_body_that_breaks_off_in_the_http_library_is_logged_with_the_request_s_id(
    worker: EngineWorker, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(body: EncodedBody) -> Iterator[bytes]:
        yield b"["
        raise RuntimeError("no more")

    monkeypatch.setattr(EncodedBody, "chunks", breaking)
    with serving(worker) as client, pytest.raises(httpx.RemoteProtocolError):
        client.post(ROLLOUT, json={**SMALL, "request_id": "cut"})
    until(lambda: any(entry["logger"] == "uvicorn.error" for entry in lines.about("cut")))


def test_a_forward_that_fails_for_several_requests_names_them_all(lines: Lines) -> None:
    logging.getLogger("flowroll.engine.scheduler.loop").warning("a forward failed", extra={"request_ids": ["a", "b c"]})
    assert lines.about("b c") == lines.about("a") != []
    text = Lines(TextFormatter())
    text.handle(logging.makeLogRecord({"msg": "a forward failed", "levelname": "WARNING", "request_ids": ["a", "b c"]}))
    assert text.lines[0].endswith("a forward failed request_ids=a,b%20c")


def test_no_value_forges_a_line_or_another_value() -> None:
    text, as_json = Lines(TextFormatter()), Lines(JsonFormatter())
    values = {"request_id": "x\n2026 ERROR y", "path": "/a b=c", "status": 200}
    for handler in (text, as_json):
        handler.handle(logging.makeLogRecord({"msg": "answered", "levelname": "INFO", "name": "flowroll.access", **values}))
    (line,) = text.lines
    assert "\n" not in line and line.endswith("answered request_id=x%0A2026%20ERROR%20y path=/a%20b%3Dc status=200")
    entry = json.loads(as_json.lines[0])
    assert "\n" not in as_json.lines[0] and entry.pop("time").endswith("+00:00")
    assert entry == {"level": "info", "logger": "flowroll.access", "message": "answered", **values}


def test_configuring_twice_leaves_one_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr(root, "handlers", [])
    configure_logging("info", "json")
    configure_logging("warning", "text")
    assert len(root.handlers) == 1 and isinstance(root.handlers[0].formatter, TextFormatter)
    root.handlers, root.level = before, level
    for name in ("flowroll", "uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.NOTSET)
