"""The server's log: one line per event on standard error, one line per HTTP request."""

from __future__ import annotations

import logging
import sys
from urllib.parse import quote

from flowroll.serving.config import LogLevel

_log = logging.getLogger("flowroll.access")
# Asked every few seconds by whatever watches the server: only worth a line when someone debugs.
_POLLED = frozenset({"/health", "/health_generate", "/liveness", "/readiness", "/metrics"})


def configure_logging(level: LogLevel) -> None:
    """Sends the records of flowroll and of the HTTP server to standard error; other libraries' from warnings on."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    for name in ("flowroll", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # Its start and stop messages say what ours say; its warnings are about broken connections.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger("uvicorn").level))


def log_request(*, method: str, path: str, status: int, seconds: float, body_bytes: int, request_id: str) -> None:
    """One line for an answered HTTP request; the same values are attributes of the log record.

    Args:
        method: E.g. "POST".
        path: As sent; quoted, so that it cannot forge a line.
        status: HTTP status of the answer.
        seconds: From the request's first byte to the answer's last.
        body_bytes: Of the answer's body.
        request_id: As in the answer's header.
    """
    fields = {
        "request_id": request_id,
        "method": method,
        "path": quote(path),
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
        "bytes": body_bytes,
    }
    level = logging.DEBUG if path in _POLLED and status < 500 else logging.INFO
    _log.log(level, " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)
