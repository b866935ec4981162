"""How a server reaches its engine: one interface, whether the engine is in the server's process or in one of its own.

`call(EngineService.sleep, "disk")` has the engine's service do something and returns a future of the result: the methods of
`EngineService` are the interface, and are written down nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from typing_extensions import override

from flowroll.engine.scheduler import StageSpan
from flowroll.engine.scheduler.request import cancelled, end_future, engine_error
from flowroll.engine.service.service import EngineService
from flowroll.engine.service.status import EngineFacts
from flowroll.errors import FlowrollError

P = ParamSpec("P")
T = TypeVar("T")
FailureListener = Callable[[FlowrollError], None]
# Calls that may take long are made at the same time by so many threads; more of them wait.
_MAX_BLOCKED = 32


class CallFuture(Future[T]):
    """The result to come of a call.

    Attributes:
        spans: Where the time of a request went, once it has ended; empty for other calls.
        number: The place of the call among all calls of an engine in another process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = -1
        self.spans: tuple[StageSpan, ...] = ()

    def end(self, result: Any, error: BaseException | None, spans: tuple[StageSpan, ...] = ()) -> None:
        """Ends in the result or the error, unless it has ended."""
        if not self.done():
            self.spans = spans
        end_future(self, result, error=error)


class EngineClient(ABC):
    """An engine as a server sees it.

    Attributes:
        facts: What never changes while the engine runs.
    """

    facts: EngineFacts

    @property
    @abstractmethod
    def failure(self) -> FlowrollError | None:
        """Why the engine is down for good; None while it is up."""

    @overload
    def call(
        self, method: Callable[Concatenate[EngineService, P], Future[T]], /, *args: P.args, **options: P.kwargs
    ) -> CallFuture[T]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[EngineService, P], T], /, *args: P.args, **options: P.kwargs
    ) -> CallFuture[T]: ...
    def call(self, method: Callable[..., Any], /, *args: Any, **options: Any) -> CallFuture[Any]:
        """Has a method of the engine's service called. Calls are begun in their order; an error is the future's."""
        return self._call(method.__name__, args, options)

    @abstractmethod
    def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> CallFuture[Any]: ...

    @abstractmethod
    def cancel(self, future: Future[Any]) -> None:
        """Ends a call of `submit` or `submit_scores` whose caller went away."""

    @abstractmethod
    def on_failure(self, listener: FailureListener) -> None:
        """Calls it, on a thread of its own, once the engine is down."""

    @abstractmethod
    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Ends what runs with `ShuttingDownError`, and the engine's threads. May be called twice.

        Args:
            timeout_s: How long the engine may take to end what it is at.

        Returns:
            Whether it has ended in time.
        """


class Dispatcher:
    """Calls methods of a service: those that may take long on threads, the others at once.

    Args:
        service: The service.
    """

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self._pool = ThreadPoolExecutor(_MAX_BLOCKED, thread_name_prefix="flowroll-call")

    def begin(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Future[Any]:
        """Begins a call; the future of a request is one that `EngineService.cancel` takes."""
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
        """Takes no more calls; those that run end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def outcome(ended: Future[Any]) -> tuple[Any, BaseException | None, tuple[StageSpan, ...]]:
    """The result, the error and the spans of a call that has ended."""
    spans = getattr(ended, "spans", ())
    if ended.cancelled():
        return None, cancelled(), spans
    error = ended.exception()
    return None if error is not None else ended.result(), error, spans


class InProcessEngine(EngineClient):
    """An engine in this process.

    Args:
        service: The engine's service, which its owner closes, or `close`.
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
