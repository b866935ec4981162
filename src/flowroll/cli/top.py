"""`flowroll top` shows a live view of a server's load."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from flowroll.cli.dashboard import Scrape, frame
from flowroll.cli.options import DEFAULT_URL, ApiKey, Url
from flowroll.errors import FlowrollError, ServerConnectionError, UnauthorizedError

if TYPE_CHECKING:
    from flowroll.client import Client

# A minute of scrapes, at the default interval.
_MAX_SCRAPES = 61
_TIMEOUT_S = 5.0


def top(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, made of two looks, and end.")] = False,
) -> None:
    """Watch a server's load, rates, time by stage and errors until Ctrl-C."""
    from flowroll.client import Client

    console, scrapes = Console(), deque[Scrape](maxlen=_MAX_SCRAPES)
    with Client(url, api_key=api_key, timeout_s=_TIMEOUT_S) as client, suppress(KeyboardInterrupt):
        info = _look(client, scrapes)
        if once:
            time.sleep(interval_s)
            console.print(frame(_look(client, scrapes), scrapes, width=console.width))
            return
        first = frame(info, scrapes, width=console.width)
        with Live(first, console=console, screen=console.is_terminal, auto_refresh=False) as live:
            next_s = time.monotonic()
            while True:
                next_s = max(next_s + interval_s, time.monotonic())
                time.sleep(max(next_s - time.monotonic(), 0.0))
                silent_s = None
                try:
                    info = _look(client, scrapes)
                except UnauthorizedError:
                    raise
                except FlowrollError:
                    # It may come back; until then the last numbers stay.
                    silent_s = time.monotonic() - scrapes[-1].at_s
                live.update(frame(info, scrapes, width=console.width, silent_s=silent_s), refresh=True)


def _look(client: Client, scrapes: deque[Scrape]) -> dict[str, Any]:
    """Asks a server for its metrics, which are appended to the earlier scrapes, and for its GET /server_info.

    Raises:
        ServerConnectionError: No flowroll server answers.
        FlowrollError: The server answered with this error.
    """
    info = client.server_info()
    try:
        scrape = Scrape.read(client.metrics(), time.monotonic())
    except ValueError as error:
        raise ServerConnectionError(f"/metrics must be a flowroll server's, got {error}; check the URL.") from error
    if not scrape.series.get("flowroll_steps_total") or "batching" not in info:
        raise ServerConnectionError("the server must be a flowroll server of this version, got another; check the URL.")
    scrapes.append(scrape)
    return info
