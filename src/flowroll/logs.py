"""The server's log on standard error: one line per event and one per HTTP request, without prompts and tokens.

Every record that is about a request carries its id as the attribute `request_id`. The engine's threads give it themselves; all
other records, those of the HTTP library too, get it from the request that is being answered.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Literal, TypeAlias
from urllib.parse import quote

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
# Lines to read, or a JSON object a line.
LogFormat: TypeAlias = Literal["text", "json"]

_log = logging.getLogger("flowroll.access")
# Whatever watches the server asks these every few seconds: they are only worth a line at level debug.
POLLED = frozenset({"/health", "/health_generate", "/liveness", "/readiness", "/metrics", "/server_info"})
# Gives the id of the request that this task or thread works for. A function, because the caller's own id is known late.
_current_id: ContextVar[Callable[[], str] | None] = ContextVar("flowroll_request_id", default=None)
# The attributes that every record has. uvicorn adds its message once more, with colours.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def name_request(request_id: Callable[[], str]) -> None:
    """Lets this task, and the tasks and threads that it starts, log for the request with this id."""
    _current_id.set(request_id)


class LineFormatter(logging.Formatter):
    """Writes a record as a line: time (UTC), level, logger, message, then the values that were given with it.

    A record without a request id gets the id of the request that is being answered.

    Args:
        log_format: "text": values as name=value, and a traceback in lines of its own; "json": one object, all in one line.
    """

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._is_json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as one line."""
        # Ray puts private attributes of its own on every record of a process that imports it.
        values = {name: value for name, value in vars(record).items() if name not in _USUAL and not name.startswith("_")}
        if (request_id := _current_id.get()) is not None:
            values.setdefault("request_id", request_id())
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        exception = self.formatException(record.exc_info) if record.exc_info else ""
        if self._is_json:
            entry = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
            # In ASCII a record is one line and valid UTF-8, whatever is in its message.
            return json.dumps(entry | values | ({"exception": exception} if exception else {}), default=str)
        shown = (f"{name}={_shown(name, value)}" for name, value in values.items())
        line = " ".join([time, record.levelname, record.name, record.getMessage(), *shown])
        return f"{line}\n{exception}" if exception else line


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Sends the records of flowroll and of the HTTP server to standard error, and the warnings of other libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(log_format))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("flowroll", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # Its messages at start and stop repeat ours; its warnings are about broken connections.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger("uvicorn").level))


def log_request(*, path: str, status: int, values: Mapping[str, object]) -> None:
    """Writes one line about an answered HTTP request.

    Args:
        path: The path as it was sent; quoted here, so that it cannot forge a line.
        status: HTTP status of the answer.
        values: What else is known; they become attributes of the log record, like path and status.
    """
    level = logging.DEBUG if path in POLLED and status < 500 else logging.INFO
    _log.log(level, "answered", extra={**values, "path": quote(path), "status": status})


def _shown(name: str, value: object) -> str:
    """Returns a value as text that cannot forge a line or another value; ids look as they do in the answer's header."""
    if name == "request_ids":
        return ",".join(map(quote, value)) if isinstance(value, list) else str(value)
    text = str(value)
    return quote(text) if name == "request_id" or not text.isprintable() or " " in text else text
