"""An engine in another process, seen from the server's process.

This way neither the Python code of a busy server nor the sending of answers slows down the engine's steps. The processes share
a socket pair and memory; when one of them ends, the other notices immediately.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any

from typing_extensions import override

from flowroll.engine.service.channel import Channel, ChannelClosedError
from flowroll.engine.service.client import CallFuture, EngineClient, FailureListener
from flowroll.engine.service.messages import Answer, Call, Cancel, Close, EngineOptions, Failed, Ready
from flowroll.errors import FlowrollError, RankLostError, ShuttingDownError, fresh

__all__ = ["EngineOptions", "EngineProcess"]

_log = logging.getLogger(__name__)
# How much longer than its timeout a process may take to end, in seconds.
_END_S = 5.0


class EngineProcess(EngineClient):
    """Starts the process of an engine and reaches it. It is a context manager, which ends the process.

    Args:
        options: The options that the engine is started with.
    """

    def __init__(self, options: EngineOptions) -> None:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with other:
            command = [sys.executable, "-m", "flowroll.engine.service", str(other.fileno())]
            # In a new session, so that Ctrl-C at the terminal reaches only the server, which then ends this process in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()], start_new_session=True
            )
        self._channel = Channel(own)
        self._numbers = itertools.count()
        self._calls: dict[int, CallFuture[Any]] = {}
        self._lock = threading.Lock()
        self._failure: FlowrollError | None = None
        self._listeners: list[FailureListener] = []
        self._is_closing = False
        self._reader = threading.Thread(target=self._read, name="flowroll-engine", daemon=True)
        with contextlib.suppress(ChannelClosedError):  # `wait` raises the reason
            self._channel.send(options)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The id of the engine's process."""
        return self._process.pid

    @property
    @override
    def failure(self) -> FlowrollError | None:
        return self._failure

    def wait(self) -> None:
        """Waits until the engine is up.

        Raises:
            FlowrollError: The engine could not be started; it is the reason.
        """
        try:
            first = self._channel.receive()
        except ChannelClosedError:
            raise self._lost() from None
        if isinstance(first, Failed):
            raise first.error
        assert isinstance(first, Ready)
        self.facts = first.facts
        self._reader.start()

    @override
    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> CallFuture[Any]:
        future: CallFuture[Any] = CallFuture()
        # Calls are numbered and sent under the lock, so that they are sent in the order of their numbers.
        with self._lock:
            if self._failure is not None:
                future.end(None, fresh(self._failure))
                return future
            if self._is_closing:
                future.end(None, _shutting_down())
                return future
            number = next(self._numbers)
            self._calls[number], future.number = future, number
            with contextlib.suppress(ChannelClosedError):  # the reader ends all calls
                self._channel.send(Call(id=number, method=method, args=args, options=options))
        return future

    @override
    def cancel(self, future: Future[Any]) -> None:
        assert isinstance(future, CallFuture)
        with contextlib.suppress(ChannelClosedError):
            self._channel.send(Cancel(id=future.number))

    @override
    def on_failure(self, listener: FailureListener) -> None:
        with self._lock:
            self._listeners.append(listener)
            failure = self._failure
        if failure is not None:
            threading.Thread(target=listener, args=(failure,), daemon=True).start()

    @override
    def close(self, *, timeout_s: float = 10.0) -> bool:
        self._is_closing = True
        with contextlib.suppress(ChannelClosedError):
            self._channel.send(Close(timeout_s=timeout_s))
        try:
            self._process.wait(timeout_s + _END_S)
        except subprocess.TimeoutExpired:
            _log.error("the engine's process does not end and is killed")
            self.kill()
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """Ends the process immediately and waits for its end. The ranks that it has started end with it."""
        self._is_closing = True
        self._process.kill()
        self._process.wait()
        self._channel.close()
        if self._reader.is_alive() and threading.current_thread() is not self._reader:
            self._reader.join(_END_S)

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if isinstance(message, Answer):
                    future = self._calls.pop(message.id, None)
                    if future is not None:
                        future.end(message.result, message.error, message.spans)
                    del message, future
                elif isinstance(message, Failed):
                    self._fail(message.error)
        except ChannelClosedError:
            pass
        except BaseException:
            _log.exception("a message of the engine's process cannot be read")
            self._process.kill()
        if not self._is_closing:
            self._fail(self._lost())
        self._end_calls()

    def _fail(self, error: FlowrollError) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            listeners = list(self._listeners)
        for listener in listeners:
            threading.Thread(target=listener, args=(error,), daemon=True).start()

    def _end_calls(self) -> None:
        with self._lock:
            left, self._calls = list(self._calls.values()), {}
        for future in left:
            future.end(None, _shutting_down() if self._failure is None else fresh(self._failure))

    def _lost(self) -> RankLostError:
        """Makes the error of an engine whose process has ended or is about to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        status = self._process.poll()
        end = "a closed connection" if status is None else f"its end with status {status}"
        if status is not None and status < 0:
            end = f"its end by {signal.Signals(-status).name}"
        return RankLostError(f"the engine's process must live to answer, got {end}; restart the server, and see its log.")


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server must run to answer, got a shutdown; send the request to another replica.")
