"""An engine in another process, seen from the server's process.

This way neither the Python code of a busy server nor the sending of answers slows down the engine's steps. The processes share
a socket pair and memory; when one of them ends, the other notices immediately.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import signal
import socket
import subprocess
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from typing_extensions import override

from flowroll.engine.service.channel import Channel, ChannelClosedError, TensorsLostError
from flowroll.engine.service.client import CallFuture, EngineClient, FailureListener
from flowroll.engine.service.messages import Answer, Call, Cancel, Close, EngineOptions, Failed, Ready
from flowroll.engine.service.service import EngineService
from flowroll.engine.service.status import EngineStatus
from flowroll.errors import EngineError, FlowrollError, RankLostError, ShuttingDownError, fresh
from flowroll.parallel.processes import bound_command

__all__ = ["EngineOptions", "EngineProcess"]

_log = logging.getLogger(__name__)
# How long the end of a process or a thread that is on its way may take, in seconds.
_END_S = 5.0
# How much longer than its timeout a process may take to end before it is killed, in seconds.
_KILL_S = 1.0
# How often a process is asked for a sign of life.
_PULSE_S = 1.0


class EngineProcess(EngineClient):
    """Starts the process of an engine and reaches it. It is a context manager, which ends the process.

    Args:
        options: The options that the engine is started with.
    """

    def __init__(self, options: EngineOptions) -> None:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with other:
            # The thread that calls this must live as long as the engine: a server's main thread does.
            command = bound_command("flowroll.engine.service", str(other.fileno()))
            # In a session of its own, so that a Ctrl-C at the terminal reaches the server alone, which then ends it in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()], start_new_session=True
            )
        self._channel, self._timeout_s = Channel(own), options.rank_timeout_s
        # Sent on a thread of its own: a process that is stopped takes nothing, and no caller may wait for it.
        self._outbox: queue.SimpleQueue[Call | Cancel | Close | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._calls: dict[int, CallFuture[Any]] = {}
        self._lock = threading.Lock()
        self._failure: FlowrollError | None = None
        self._listeners: list[FailureListener] = []
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"flowroll-engine-{target.__name__[1:]}", daemon=True)
            for target in (self._read, self._write, self._watch)
        ]
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
        for thread in self._threads:
            thread.start()

    @override
    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> CallFuture[Any]:
        future: CallFuture[Any] = CallFuture()
        # Calls are numbered under the lock, so that they are sent in the order of their numbers.
        with self._lock:
            if self._failure is not None:
                future.end(None, fresh(self._failure))
                return future
            if self._closing.is_set():
                future.end(None, _shutting_down())
                return future
            number = next(self._numbers)
            self._calls[number], future.number = future, number
            self._outbox.put(Call(id=number, method=method, args=args, options=options))
        return future

    @override
    def cancel(self, future: Future[Any]) -> None:
        assert isinstance(future, CallFuture)
        self._outbox.put(Cancel(id=future.number))

    @override
    def on_failure(self, listener: FailureListener) -> None:
        with self._lock:
            self._listeners.append(listener)
            failure = self._failure
        if failure is not None:
            threading.Thread(target=listener, args=(failure,), daemon=True).start()

    @override
    def close(self, *, timeout_s: float = 10.0) -> bool:
        self._closing.set()
        self._outbox.put(Close(timeout_s=timeout_s))
        try:
            self._process.wait(timeout_s + _KILL_S)
        except subprocess.TimeoutExpired:
            _log.error("the engine's process does not end and is killed")
            self.kill()
            return False
        self.kill()
        return True

    def end_process(self) -> None:
        """Ends the process immediately, and does not wait. The ranks that it has started end with it."""
        self._process.kill()

    def kill(self) -> None:
        """Ends the process immediately and waits for its end. The ranks that it has started end with it."""
        self._closing.set()
        self._outbox.put(None)
        self._process.kill()
        self._process.wait()
        self._channel.close()
        for thread in self._threads:
            if thread.is_alive() and threading.current_thread() is not thread:
                thread.join(_END_S)

    def _write(self) -> None:
        with contextlib.suppress(ChannelClosedError):  # the reader ends all calls
            while (message := self._outbox.get()) is not None:
                self._send(message)
                del message  # and the memory that it holds

    def _send(self, message: Call | Cancel | Close) -> None:
        try:
            self._channel.send(message)
        except ChannelClosedError:
            raise
        except BaseException as error:
            _log.exception("a message cannot be sent to the engine's process")
            future = self._calls.pop(message.id, None) if isinstance(message, Call) else None
            if future is not None:
                reason = f"{type(error).__name__}: {error}"
                future.end(None, EngineError(f"the call must reach the engine, got {reason}; see the log."))

    def _watch(self) -> None:
        """Ends a process that is stopped, or hangs: every call would wait for ever."""
        sign: CallFuture[EngineStatus] | None = None
        num_silent = 0
        # Pulses are counted, not seconds: this process may have been stopped too.
        while not self._closing.wait(_PULSE_S) and self._failure is None:
            if sign is None or sign.done():
                sign, num_silent = self.call(EngineService.status), 0
                continue
            num_silent += 1
            if num_silent * _PULSE_S >= self._timeout_s:
                self._fail(
                    RankLostError(
                        f"the engine's process must give a sign of life within {self._timeout_s:g} s, got silence; look after "
                        "its machine and restart the server."
                    )
                )
                self._process.kill()

    def _read(self) -> None:
        try:
            while True:
                message = self._receive()
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
        if not self._closing.is_set():
            self._fail(self._lost())
        self._end_calls()

    def _receive(self) -> Any:
        try:
            return self._channel.receive()
        except TensorsLostError as lost:
            _log.error("the tensors of an answer are lost: %s", lost)
            error = EngineError(f"the answer must find room in the server's process, got {lost}.")
            return replace(lost.message, result=None, error=error)

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
