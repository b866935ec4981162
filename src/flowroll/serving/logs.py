"""The server's log: one line per event on standard error, one line per HTTP request; never a prompt, never a token.

Every record that is about a request carries its id as the attribute `request_id`: records of the engine's threads say it
themselves, all others, those of the HTTP library too, get it from the request that is being answered.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

from flowroll.serving.config import LogFormat, LogLevel

_log = logging.getLogger("flowroll.access")
# Asked every few seconds by whatever watches the server: only worth a line when someone debugs.
POLLED = frozenset({"/health", "/health_generate", "/liveness", "/readiness", "/metrics", "/server_info"})
# Tells the id of the request that this task or thread works for; a function, since its caller's own is known late.
_current_id: ContextVar[Callable[[], str] | None] = ContextVar("flowroll_request_id", default=None)
# What every record has. uvicorn adds its message once more, with colours.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def name_request(request_id: Callable[[], str]) -> None:
    """From here on this task, and what it starts, logs for the request of that id."""
    _current_id.set(request_id)


class RequestIdFilter(logging.Filter):
    """Gives a record the id of the request that is being answered, unless it has one."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything pass."""
        request_id = _current_id.get()
        if request_id is not None and not hasattr(record, "request_id"):
            record.request_id = request_id()
        return True


class TextFormatter(logging.Formatter):
    """Lines to read: time, level, logger, message, then the record's own values as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        values = (f"{name}={_shown(name, value)}" for name, value in _own_values(record).items())
        return " ".join([super().formatMessage(record), *values])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the record's own values, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_own_values(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # ASCII: whatever is in a message, it is one line and valid UTF-8.
        return json.dumps(entry, default=str)


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Sends the records of flowroll and of the HTTP server to standard error; other libraries' from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("flowroll", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # Its start and stop messages say what ours say; its warnings are about broken connections.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger("uvicorn").level))


def log_request(*, path: str, status: int, values: Mapping[str, object]) -> None:
    """One line for an answered HTTP request.

    Args:
        path: As sent; quoted here, so that it cannot forge a line.
        status: HTTP status of the answer.
        values: What else is known; become attributes of the log record, like path and status.
    """
    level = logging.DEBUG if path in POLLED and status < 500 else logging.INFO
    _log.log(level, "answered", extra={**values, "path": quote(path), "status": status})


def _own_values(record: logging.LogRecord) -> dict[str, Any]:
    """What was said with the record beside its message."""
    return {name: value for name, value in vars(record).items() if name not in _USUAL}


def _shown(name: str, value: object) -> str:
    """A value that cannot forge a line, or a second value; ids look as they do in the answer's header."""
    if name == "request_ids":
        return ",".join(map(quote, value)) if isinstance(value, list) else str(value)
    text = str(value)
    return quote(text) if name == "request_id" or not text.isprintable() or " " in text else text
