"""`flowroll top`: a server at work, live."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from flowroll.cli.dashboard import frame
from flowroll.cli.options import ApiKey
from flowroll.cli.scrape import Scrape
from flowroll.errors import FlowrollError, ServerConnectionError, UnauthorizedError

if TYPE_CHECKING:
    from flowroll.client import Client

# A minute of looks.
_KEPT = 61
_PATIENCE_S = 5.0


def top(
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:30000",
    api_key: ApiKey = None,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, of two looks, and end.")] = False,
) -> None:
    """Watch a server: load, rates, time by stage, errors; until Ctrl-C."""
    from flowroll.client import Client

    with Client(url, api_key=api_key, timeout_s=_PATIENCE_S) as client:
        view = _View(client)
        view.look()
        console = Console()
        try:
            if once:
                time.sleep(interval_s)
                view.look()
                console.print(view.frame(console.width))
                return
            _watch(view, console, interval_s)
        except KeyboardInterrupt:
            pass


def _watch(view: _View, console: Console, interval_s: float) -> None:
    with Live(view.frame(console.width), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + interval_s, time.monotonic())
            time.sleep(max(next_s - time.monotonic(), 0.0))
            try:
                view.look()
            except UnauthorizedError:
                raise
            except FlowrollError:
                # It is gone, or on its way out or in. It may come back; until then the last numbers stay.
                view.miss()
            live.update(view.frame(console.width), refresh=True)


class _View:
    """What was seen of a server.

    Args:
        client: Asks it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._info: dict[str, Any] = {}
        self._scrapes: deque[Scrape] = deque(maxlen=_KEPT)
        self._silent_since_s: float | None = None

    def look(self) -> None:
        """Asks once.

        Raises:
            ServerConnectionError: No flowroll server answers.
            FlowrollError: What it answers instead.
        """
        info = self._client.server_info()
        try:
            scrape = Scrape.read(self._client.metrics(), time.monotonic())
        except ValueError as error:
            raise ServerConnectionError(f"/metrics must be a flowroll server's, got {error}; check the URL.") from error
        if not scrape.series.get("flowroll_steps_total") or "batching" not in info:
            raise ServerConnectionError("the server must be a flowroll server of this version, got another; check the URL.")
        self._info, self._silent_since_s = info, None
        self._scrapes.append(scrape)

    def miss(self) -> None:
        """It did not answer."""
        if self._silent_since_s is None:
            self._silent_since_s = time.monotonic()

    def frame(self, width: int) -> Any:
        """The picture of it."""
        silent_s = None if self._silent_since_s is None else time.monotonic() - self._silent_since_s
        return frame(self._info, list(self._scrapes), width=width, silent_s=silent_s)
