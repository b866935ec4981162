"""From a configuration to a running server, and down again.

Owns the process: signals, the listening socket, the log. The order is the promise: the checkpoint is loaded before the port
is bound, and everything that was accepted is answered before the port is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from flowroll.engine import follow
from flowroll.engine.service import EngineClient, EngineFacts, EngineOptions, EngineProcess, EngineService
from flowroll.errors import FlowrollError
from flowroll.logs import configure_logging
from flowroll.parallel.rendezvous import check_world, torchrun_rank
from flowroll.serving.app import create_app
from flowroll.serving.config import ServerConfig
from flowroll.serving.connections import HttpConfig, open_listener
from flowroll.serving.tracing import Tracing, otlp_provider

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DRAIN_POLL_S = 0.02
# Beside one for each connection: log, sockets, and for moments the tensors of answers and uploads.
_SPARE_DESCRIPTORS = 1024


def serve(config: ServerConfig) -> None:
    """Serves a checkpoint until SIGTERM or Ctrl-C.

    On the first signal no request is taken any more (/readiness says so), those that were accepted get `config.grace_s`
    seconds to finish, and what is left then ends in a `ShuttingDownError`. A second signal cuts the grace period short.

    The engine has a process of its own, which starts those of its other ranks. Under torchrun rank 0 serves, its engine joins
    torchrun's group, and the other ranks follow it until it stops.

    Raises:
        SystemExit: With one line for the user and status 1: the checkpoint cannot be loaded, the address cannot be bound, or a
            rank was lost, which ends every request. With status 0: a signal came before the server was up.
    """
    configure_logging(config.log_level, config.log_format)
    _allow_descriptors(config.max_connections + _SPARE_DESCRIPTORS)
    place = torchrun_rank()
    if place is not None and place.rank > 0:
        _follow(config)
        return
    with _signals_end_start(), _spans(config) as tracing:
        _log.info("loading %s", config.model)
        try:
            if place is not None:
                check_world(config.layout, place)
            with EngineProcess(_engine_options(config)) as engine:
                engine.wait()
                with open_listener(config) as listener:
                    _announce(config, engine.facts, listener)
                    _DrainingServer(config, engine, tracing).run(sockets=[listener])
        except FlowrollError as error:
            raise SystemExit(f"Error: {error.message}") from None
    if engine.failure is not None:
        raise SystemExit(f"Error: {engine.failure.message}")
    _log.info("stopped")


def _allow_descriptors(count: int) -> None:
    """Lets this process have so many open files, as far as it may: often the limit is 1024, and a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _engine_options(config: ServerConfig) -> EngineOptions:
    return EngineOptions(**{field.name: getattr(config, field.name) for field in dataclasses.fields(EngineOptions)})


def _rank_options(config: ServerConfig) -> dict[str, Any]:
    """Returns what every rank of the engine has to be given alike."""
    names = ("variant", "dtype", "device", "layout", "rank_timeout_s")
    return {name: getattr(config, name) for name in names}


def _follow(config: ServerConfig) -> None:
    # torchrun signals every process; rank 0 is the one that says when to stop.
    for sig in _SIGNALS:
        signal.signal(sig, signal.SIG_IGN)
    try:
        follow(config.model, **_rank_options(config))
    except FlowrollError as error:
        raise SystemExit(f"Error: {error.message}") from None


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets the engine finish before it stops to listen."""

    def __init__(self, config: ServerConfig, engine: EngineClient, tracing: Tracing | None) -> None:
        super().__init__(HttpConfig(create_app(engine, config, tracing=tracing), config))
        self._engine = engine
        self._grace_s = config.grace_s
        self._in_a_hurry = False
        engine.on_failure(self._on_failure)

    def _on_failure(self, error: FlowrollError) -> None:
        """Ends the main loop: nothing can be served any more."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal. uvicorn's own would raise it again at the end, for an exit status that tells of a failure."""
        self._in_a_hurry = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, and says so."""
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def main_loop(self) -> None:
        """Serves until a signal, then drains."""
        await super().main_loop()
        if self._engine.failure is not None:
            return
        _log.info("stopping: accepted requests have %g s to finish", self._grace_s)
        deadline_s = time.monotonic() + self._grace_s
        with contextlib.suppress(FlowrollError, TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._grace_s + _DRAIN_POLL_S):
                await asyncio.wrap_future(self._engine.call(EngineService.drain))
                while await self._has_work() and time.monotonic() < deadline_s and not self._in_a_hurry:
                    await asyncio.sleep(_DRAIN_POLL_S)
        await asyncio.to_thread(self._engine.close)

    async def _has_work(self) -> bool:
        """Returns whether a request is still to be run, or its answer to be sent."""
        counts = (await asyncio.wrap_future(self._engine.call(EngineService.status))).counts
        return bool(counts.pending or counts.running or self.server_state.tasks)


@contextlib.contextmanager
def _spans(config: ServerConfig) -> Iterator[Tracing | None]:
    """Sends spans where the configuration says; at the end, those that are left.

    Raises:
        SystemExit: The libraries for that are not installed.
    """
    if config.otlp_endpoint is None:
        yield None
        return
    try:
        provider = otlp_provider(config.otlp_endpoint)
    except FlowrollError as error:
        raise SystemExit(f"Error: {error.message}") from None
    try:
        yield Tracing(provider)
    finally:
        provider.shutdown()


@contextlib.contextmanager
def _signals_end_start() -> Iterator[None]:
    """Ends the process in order at a signal, until uvicorn takes the signals over, and after."""

    def stop(sig: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {sig: signal.signal(sig, stop) for sig in _SIGNALS}
    try:
        yield
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)


def _announce(config: ServerConfig, facts: EngineFacts, listener: socket.socket) -> None:
    """Prints the resolved configuration, once."""
    shown = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.repr}
    resolved = {
        **shown,
        **{field.name: getattr(facts.info, field.name) for field in dataclasses.fields(facts.info)},
        "port": listener.getsockname()[1],
        "api_key": "set" if config.api_key else "none",
    }
    _log.info("configuration: %s", " ".join(f"{name}={value!r}" for name, value in resolved.items()))
    _log.info("memory: %s", facts.memory)
    if config.api_key is None and not config.is_loopback:
        _log.warning(
            "%s is reachable from other machines and no api_key is set: anybody who reaches it can use this server", config.host
        )
