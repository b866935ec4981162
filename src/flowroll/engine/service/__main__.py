"""The process of a server's engine: `python -m flowroll.engine.service DESCRIPTOR`. `EngineProcess` starts it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flowroll.engine.engine import Engine
from flowroll.engine.loading import silence_model_libraries
from flowroll.engine.scratch import sweep_scratch
from flowroll.engine.service.channel import Channel, ChannelClosedError, TensorsLostError
from flowroll.engine.service.client import Dispatcher, outcome
from flowroll.engine.service.messages import Answer, Call, Cancel, Close, EngineOptions, Failed, Ready
from flowroll.engine.service.service import EngineService
from flowroll.errors import EngineError, FlowrollError
from flowroll.logs import configure_logging

# The exit status of a process whose server has ended.
ORPHANED = 70
# The number of threads that send answers; sending copies large tensors into shared memory.
_NUM_SENDERS = 4


def main() -> None:
    """Loads the engine, reports that it is ready, and serves the server's calls until the server closes it or ends."""
    # Signals are left to the server, which ends this process.
    # A handler, and not SIG_IGN: the processes of other ranks would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    options = channel.receive()
    assert isinstance(options, EngineOptions)
    configure_logging(options.log_level, options.log_format)
    served = _Served(channel)
    threading.Thread(target=served.read, name="flowroll-server", daemon=True).start()
    try:
        engine, service = _load(options)
    except FlowrollError as error:
        _tell(channel, Failed(error=error))
        _exit(1)
    except BaseException as error:
        logging.getLogger(__name__).exception("the engine cannot be loaded")
        _tell(channel, Failed(error=EngineError(f"the engine must load, got {type(error).__name__}: {error}; see the log.")))
        _exit(1)
    engine.on_failure(lambda error: _tell(channel, Failed(error=error)))
    served.start(service)
    timeout_s = served.wait_for_close()
    has_ended = service.close(timeout_s=timeout_s)
    if has_ended:
        engine.close()
    _exit(0 if has_ended else 1)


def _load(options: EngineOptions) -> tuple[Engine, EngineService]:
    silence_model_libraries()
    for path in sweep_scratch():
        logging.getLogger(__name__).info("%s is removed: the process that made it has ended", path)
    engine = Engine(
        options.model,
        variant=options.variant,
        dtype=options.dtype,
        device=options.device,
        limits=options.limits,
        batching=options.batching,
        adapter_limits=options.adapter_limits,
        layout=options.layout,
        rank_timeout_s=options.rank_timeout_s,
        compile=options.compile,
        exactness=options.exactness,
        fast_parts=options.fast_parts,
        cache_dir=options.cache_dir,
    )
    return engine, EngineService(
        engine, max_queue=options.max_queue, max_control_queue=options.max_control_queue, max_groups=options.max_groups
    )


class _Served:
    """Reads the server's messages, and sends it the answers.

    Args:
        channel: The channel to the server.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._closing: Future[float] = Future()
        self._dispatcher: Dispatcher
        self._service: EngineService
        self._requests: dict[int, Future[Any]] = {}
        self._senders = ThreadPoolExecutor(_NUM_SENDERS, thread_name_prefix="flowroll-answer")

    def start(self, service: EngineService) -> None:
        """Starts to serve calls, and tells the server that the engine is ready."""
        self._service, self._dispatcher = service, Dispatcher(service)
        _tell(self._channel, Ready(facts=service.facts()))

    def wait_for_close(self) -> float:
        """Waits until the server closes the engine; returns how many seconds running work may take to end."""
        return self._closing.result()

    def read(self) -> None:
        """Handles the server's messages until the server has ended."""
        try:
            while True:
                try:
                    message = self._channel.receive()
                except TensorsLostError as lost:
                    refused = EngineError(f"the call must find room in the engine's process, got {lost}.")
                    self._answer(lost.message.id, None, refused, ())
                    continue
                if isinstance(message, Call):
                    self._begin(message)
                elif isinstance(message, Cancel):
                    if (request := self._requests.get(message.id)) is not None:
                        self._service.cancel(request)
                elif isinstance(message, Close) and not self._closing.done():
                    self._closing.set_result(message.timeout_s)
                del message
        except ChannelClosedError:
            # The server has ended. The ranks that this process has started end with it.
            _exit(ORPHANED)
        except BaseException:
            logging.getLogger(__name__).exception("a message of the server cannot be read")
            _exit(1)

    def _begin(self, call: Call) -> None:
        number = call.id
        future = self._dispatcher.begin(call.method, call.args, call.options)
        if future.done():
            self._answer(number, *outcome(future))
            return
        self._requests[number] = future

        def end(ended: Future[Any]) -> None:
            self._requests.pop(number, None)
            # Answered on another thread, because the scheduler's loop runs this callback and must go on with its steps.
            self._senders.submit(self._answer, number, *outcome(ended))

        future.add_done_callback(end)

    def _answer(self, number: int, result: Any, error: BaseException | None, spans: Any) -> None:
        try:
            self._channel.send(Answer(id=number, result=result, error=error, spans=spans))
        except ChannelClosedError:
            _exit(ORPHANED)
        except BaseException as failure:
            logging.getLogger(__name__).exception("an answer cannot be sent")
            lost = EngineError(f"the answer must reach the server, got {type(failure).__name__}: {failure}; see the log.")
            _tell(self._channel, Answer(id=number, result=None, error=lost, spans=spans))


def _tell(channel: Channel, message: object) -> None:
    with contextlib.suppress(ChannelClosedError):
        channel.send(message)


def _exit(status: int) -> None:
    """Ends the process without waiting for threads that may be stuck with a lost rank."""
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    main()
