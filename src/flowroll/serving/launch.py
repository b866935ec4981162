"""From a configuration to a running server, and down again.

Owns the process: signals, the listening socket, the log. The order is the promise: the checkpoint is loaded before the port
is bound, and everything that was accepted is answered before the port is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from flowroll.engine import follow
from flowroll.engine.service import EngineClient, EngineFacts, EngineOptions, EngineProcess, EngineService
from flowroll.errors import FlowrollError
from flowroll.logs import configure_logging
from flowroll.parallel.rendezvous import check_world, torchrun_rank
from flowroll.serving.app import create_app
from flowroll.serving.config import ServerConfig
from flowroll.serving.connections import HttpConfig, open_listener, quieten_accept_errors
from flowroll.serving.tracing import Tracing, otlp_provider

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DRAIN_POLL_S = 0.02
# After the grace period: how long the engine may take to end its current step before it is killed, and how long after that
# period the process ends at the latest, whatever its threads do.
_CLOSE_S, _END_S = 1.0, 5.0
# Beside one for each connection: log, sockets, and for moments the tensors of answers and uploads.
_SPARE_DESCRIPTORS = 1024


def serve(
    config: ServerConfig,
    *,
    open_engine: Callable[[ServerConfig], AbstractContextManager[EngineClient]] | None = None,
    extend: Callable[[FastAPI, EngineClient], None] | None = None,
) -> None:
    """Serves a checkpoint until SIGTERM or Ctrl-C.

    On the first signal no request is taken any more (/readiness says so), those that were accepted get `config.grace_s`
    seconds to finish, and what is left then ends in a `ShuttingDownError`. A second signal cuts the grace period short. Five
    seconds after it the process has ended in any case.

    The engine has a process of its own, which starts those of its other ranks. Under torchrun rank 0 serves, its engine joins
    torchrun's group, and the other ranks follow it until it stops.

    Args:
        config: How to serve.
        open_engine: Opens another engine than a process of this server's, e.g. a fleet.
        extend: Adds routes to the app.

    Raises:
        SystemExit: With one line for the user and status 1: the checkpoint cannot be loaded, the address cannot be bound, or a
            rank was lost, which ends every request. With status 0: a signal came before the server was up.
    """
    configure_logging(config.log_level, config.log_format)
    config = _with_descriptors(config)
    place = torchrun_rank()
    if place is not None and place.rank > 0:
        _follow(config)
        return
    with _LastResort() as last_resort, _signals_end_start(), _spans(config) as tracing:
        _log.info("loading %s", config.model)
        try:
            if place is not None:
                check_world(config.layout, place)
            with (open_engine or last_resort.own_process)(config) as engine, open_listener(config) as listener:
                _announce(config, engine.facts, listener)
                app = create_app(engine, config, tracing=tracing)
                if extend is not None:
                    extend(app, engine)
                _DrainingServer(app, config, engine, last_resort).run(sockets=[listener])
        except FlowrollError as error:
            raise SystemExit(f"Error: {error.message}") from None
    if engine.failure is not None:
        raise SystemExit(f"Error: {engine.failure.message}")
    _log.info("stopped")


def _with_descriptors(config: ServerConfig) -> ServerConfig:
    """Lets this process have as many open files as its connections need: often the limit is 1024, and a connection is one.

    Returns:
        The configuration, with fewer connections where the system does not allow that many files.
    """
    wanted = config.max_connections + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most == wanted:
        return config
    # Half of them are left for all else.
    connections = max(min(config.max_connections, most - _SPARE_DESCRIPTORS), most // 2)
    _log.warning("%d open files allow %d connections, not %d; raise the hard limit", most, connections, config.max_connections)
    return dataclasses.replace(config, max_connections=connections)


def _engine_options(config: ServerConfig) -> EngineOptions:
    return EngineOptions(**{field.name: getattr(config, field.name) for field in dataclasses.fields(EngineOptions)})


def _follow(config: ServerConfig) -> None:
    # torchrun signals every process; rank 0 is the one that says when to stop.
    for sig in _SIGNALS:
        signal.signal(sig, signal.SIG_IGN)
    try:
        follow(
            config.model,
            variant=config.variant,
            dtype=config.dtype,
            device=config.device,
            layout=config.layout,
            rank_timeout_s=config.rank_timeout_s,
        )
    except FlowrollError as error:
        raise SystemExit(f"Error: {error.message}") from None


class _LastResort:
    """Ends the process at a moment, whatever its threads do then. As a context manager it is called off at the end.

    Attributes:
        engine: The engine's process, which is killed first; None: there is none yet.
    """

    def __init__(self) -> None:
        self.engine: EngineProcess | None = None
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> _LastResort:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()

    @contextlib.contextmanager
    def own_process(self, config: ServerConfig) -> Iterator[EngineClient]:
        """Starts the engine in a process of its own, which ends with this one."""
        with EngineProcess(_engine_options(config)) as engine:
            self.engine = engine
            engine.wait()
            yield engine

    def arm(self, seconds: float) -> None:
        """Ends the process in so many seconds, unless it was to end earlier."""
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _end(self) -> None:
        threads = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.current_thread())
        _log.error("the process does not end by itself and is ended; its threads: %s", threads)
        if self.engine is not None:
            self.engine.end_process()
        logging.shutdown()
        os._exit(1)


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets the engine finish before it stops to listen."""

    def __init__(self, app: FastAPI, config: ServerConfig, engine: EngineClient, last_resort: _LastResort) -> None:
        super().__init__(HttpConfig(app, config))
        self._engine, self._last_resort = engine, last_resort
        self._grace_s = config.grace_s
        self._in_a_hurry = False
        engine.on_failure(self._on_failure)

    def _on_failure(self, error: FlowrollError) -> None:
        """Ends the main loop: nothing can be served any more."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal. uvicorn's own would raise it again at the end, for an exit status that tells of a failure."""
        self._in_a_hurry = self.should_exit
        self._last_resort.arm(_END_S if self._in_a_hurry else self._grace_s + _END_S)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, and says so."""
        quieten_accept_errors(asyncio.get_running_loop())
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
                await self._engine.call(EngineService.drain)
                while await self._has_work() and time.monotonic() < deadline_s and not self._in_a_hurry:
                    await asyncio.sleep(_DRAIN_POLL_S)
        await asyncio.to_thread(self._engine.close, timeout_s=_CLOSE_S)

    async def _has_work(self) -> bool:
        """Returns whether a request is still to be run, or its answer to be sent."""
        counts = (await self._engine.call(EngineService.status)).counts
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
    """Logs the resolved configuration, once: as a table to read, or in a JSON log as an object."""
    shown = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.repr}
    resolved = {
        **shown,
        **{field.name: getattr(facts.info, field.name) for field in dataclasses.fields(facts.info)},
        "port": listener.getsockname()[1],
        "certificate": facts.info.certificate.name,
        "api_key": "set" if config.api_key else "none",
    }
    if config.log_format == "json":
        values = {name: _plain(value) for name, value in resolved.items()}
        _log.info("configuration", extra={"configuration": values})
    else:
        width = max(map(len, resolved))
        _log.info("configuration:\n%s", "\n".join(f"  {name:<{width}}  {_cell(value)}" for name, value in resolved.items()))
    _log.info("memory: %s", facts.memory)
    if config.api_key is None and not config.is_loopback:
        _log.warning(
            "%s is reachable from other machines and no api_key is set: anybody who reaches it can use this server", config.host
        )


def _cell(value: object) -> str:
    """Writes a value of the configuration in one line: `-` for none, and the fields of a dataclass by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{field.name} {_cell(getattr(value, field.name))}" for field in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items()) or "-"
    if value is None or value == ():
        return "-"
    text = ", ".join(map(_cell, value)) if isinstance(value, tuple) else str(value)
    # A path may hold a line feed, with which it would forge a line.
    return text if text.isprintable() and text else repr(text)


def _plain(value: object) -> object:
    """Returns a dataclass as a dictionary, for JSON; every other value as it is."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
