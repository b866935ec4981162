"""The interface through which a server reaches its engine, whether that runs in the server's process or in another one.

`call(EngineService.sleep, "disk")` calls a method of the engine's service and returns a future of the result. The methods of
`EngineService` are the interface; they are not repeated here.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar, overload

from typing_extensions import override

from flowroll.engine.scheduler import StageSpan
from flowroll.engine.scheduler.request import cancelled, end_future, engine_error
from flowroll.engine.service.service import EngineService
from flowroll.engine.service.status import EngineFacts
from flowroll.errors import FlowrollError

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger(__name__)
FailureListener = Callable[[FlowrollError], None]
# The number of threads for calls that may take long; further such calls wait.
_MAX_BLOCKED = 32


class CallFuture(Future[T]):
    """The future result of a call, which a coroutine may await.

    Attributes:
        spans: How the time of a request was spent, once it has ended; empty for other calls.
        number: The number of the call among all calls to an engine in another process; -1 for an engine in this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = -1
        self.spans: tuple[StageSpan, ...] = ()

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()

    def end(self, result: Any, error: BaseException | None, spans: tuple[StageSpan, ...] = ()) -> None:
        """Ends the future in the result or the error, unless it has ended already."""
        if not self.done():
            self.spans = spans
        end_future(self, result, error=error)


class EngineClient(ABC):
    """The interface of an engine for a server.

    Attributes:
        facts: The facts about the engine that do not change while it runs.
        takes_lone_buckets: Whether tensors may be put in place that are no part of an update of many buckets.
    """

    facts: EngineFacts
    takes_lone_buckets: ClassVar[bool] = True

    @property
    @abstractmethod
    def failure(self) -> FlowrollError | None:
        """The error that ended the engine for good; None while it is up."""

    @overload
    def call(
        self, method: Callable[Concatenate[EngineService, P], Future[T]], /, *args: P.args, **options: P.kwargs
    ) -> CallFuture[T]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[EngineService, P], T], /, *args: P.args, **options: P.kwargs
    ) -> CallFuture[T]: ...
    def call(self, method: Callable[..., Any], /, *args: Any, **options: Any) -> CallFuture[Any]:
        """Calls a method of the engine's service and returns a future of its result or error.

        Calls begin in the order in which they were made.
        """
        return self._call(method.__name__, args, options)

    @abstractmethod
    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> CallFuture[Any]: ...

    @abstractmethod
    def cancel(self, future: Future[Any]) -> None:
        """Cancels a call of `submit` or `submit_scores` whose caller has disconnected."""

    @abstractmethod
    def on_failure(self, listener: FailureListener) -> None:
        """Calls the listener on another thread once the engine is down."""

    @abstractmethod
    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Ends all requests with `ShuttingDownError`, and the engine's threads. May be called twice.

        Args:
            timeout_s: How many seconds the engine may take to end its current work.

        Returns:
            Whether the engine has ended in time.
        """


class Dispatcher:
    """Calls methods of a service: those that may take long on threads of a pool, the others on the calling thread.

    Args:
        service: The service whose methods are called.
    """

    def __init__(self, service: EngineService) -> None:
        self._service = service
        # Each join of a process group holds a thread until its trainer comes.
        self._pool = ThreadPoolExecutor(_MAX_BLOCKED + service.max_groups, thread_name_prefix="flowroll-call")

    def begin(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Future[Any]:
        """Begins a call and returns its future. `EngineService.cancel` accepts the future of a request."""
        method = getattr(self._service, name)
        try:
            if getattr(method, "is_blocking", False):
                return self._pool.submit(method, *args, **options)
            found = method(*args, **options)
        except FlowrollError as error:
            return _ended(error=error)
        except BaseException as error:
            return _ended(error=engine_error(error))
        return found if isinstance(found, Future) else _ended(found)

    def close(self) -> None:
        """Accepts no more calls and cancels those that wait; those that run end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def outcome(ended: Future[Any]) -> tuple[Any, BaseException | None, tuple[StageSpan, ...]]:
    """Returns the result, the error and the spans of a call that has ended.

    The error is one of ours: another process may not know the class of any other, or not be able to make one.
    """
    spans = getattr(ended, "spans", ())
    if ended.cancelled():
        return None, cancelled(), spans
    error = ended.exception()
    if error is not None and not isinstance(error, FlowrollError):
        _log.error("a call of the engine failed", exc_info=error)
        error = engine_error(error)
    return None if error is not None else ended.result(), error, spans


class InProcessEngine(EngineClient):
    """The `EngineClient` of an engine in this process.

    Args:
        service: The engine's service; its owner closes it, or `close` does.
    """

    def __init__(self, service: EngineService) -> None:
        self._service, self.facts = service, service.facts()
        self._dispatcher = Dispatcher(service)
        self._begun: dict[Future[Any], Future[Any]] = {}

    @property
    @override
    def failure(self) -> FlowrollError | None:
        return self._service.failure

    @override
    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> CallFuture[Any]:
        future: CallFuture[Any] = CallFuture()
        begun = self._begun[future] = self._dispatcher.begin(method, args, options)

        def end(ended: Future[Any]) -> None:
            self._begun.pop(future, None)
            future.end(*outcome(ended))

        begun.add_done_callback(end)
        return future

    @override
    def cancel(self, future: Future[Any]) -> None:
        if (begun := self._begun.get(future)) is not None:
            self._service.cancel(begun)

    @override
    def on_failure(self, listener: FailureListener) -> None:
        self._service.engine.on_failure(listener)

    @override
    def close(self, *, timeout_s: float = 10.0) -> bool:
        self._dispatcher.close()
        return self._service.close(timeout_s=timeout_s)


def _ended(result: Any = None, *, error: BaseException | None = None) -> Future[Any]:
    future: Future[Any] = Future()
    end_future(future, result, error=error)
    return future
