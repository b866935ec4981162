"""The asyncio client, which has the methods of `Client`, to be awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from flowroll.client import calls, exchange, policy, weights
from flowroll.client.balancing import Balancer
from flowroll.client.base import ClientBase
from flowroll.client.bounds import AnswerBody, Deadline
from flowroll.client.exchange import Call, Operation, for_any_server
from flowroll.client.route import FAILURES
from flowroll.errors import FlowrollError
from flowroll.wire.codec import WireFormat

P = ParamSpec("P")
T = TypeVar("T")


def _method(
    operation: Callable[Concatenate[WireFormat, P], Operation[T]], *, of_each: bool = False
) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """Makes the method of `AsyncClient` for an operation; see `_method` of the blocking client for the arguments."""

    @functools.wraps(operation)
    async def method(self: AsyncClient, /, *args: P.args, **values: P.kwargs) -> T:
        for server in self.servers[:-1] if of_each else ():
            await server._run(operation(self._wire_format, *args, **values))
        if of_each:
            self = self.servers[-1]
        return await self._run(operation(self._wire_format, *args, **values))

    return method


def _method_on_thread(
    operation: Callable[Concatenate[WireFormat, P], Operation[T]],
) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """Makes a method as `_method` does, but encodes on a thread, because encoding would hold up the caller's event loop."""

    @functools.wraps(operation)
    async def method(self: AsyncClient, /, *args: P.args, **values: P.kwargs) -> T:
        return await self._run(await asyncio.to_thread(operation, self._wire_format, *args, **values))

    return method


class AsyncClient(ClientBase[httpx.AsyncClient, httpx.AsyncBaseTransport]):
    """Talks to one flowroll server from asyncio; requests may run at the same time. See `Client` for arguments and errors.

    It is an asynchronous context manager: `close` closes its connections. It belongs to the event loop in which it is first
    used.

    Args:
        base_url: The server's URL, e.g. "http://127.0.0.1:30000", or a list of URLs.
        api_key: The server's bearer token, if it demands one.
        timeout_s: The longest silence of the server, in seconds.
        total_timeout_s: The most seconds that a call may take in all; None: six times `timeout_s`.
        max_answer_bytes: The most bytes of an answer with tensors.
        wire_format: "msgpack" or "json".
        proxy: The URL of a proxy on the way to the server, or "direct" for none. None: the environment's proxy.
        transport: Another httpx transport, e.g. to an app in this process.

    Attributes:
        servers: The clients of the single servers; of one URL, the client itself alone.

    Raises:
        InvalidRequestError: An argument breaks its rule, or the URL, the key or the proxy cannot be used in HTTP.
        MissingExtraError: The library for a SOCKS proxy is not installed.
    """

    servers: tuple[AsyncClient, ...]
    _http_class = httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. It may be called twice."""
        if self._balancer is None:
            await self._http.aclose()
            return
        for server in self.servers:
            await server.close()

    rollout = _method(calls.rollout)
    generate = _method(calls.generate)
    score = _method_on_thread(calls.score)
    abort_request = _method(calls.abort_request)
    post_object = _method(calls.post_object)
    health = _method(calls.health)
    server_info = _method(calls.server_info)
    models = _method(calls.models)
    metrics = _method(calls.metrics)
    wait_ready = _method(calls.wait_ready, of_each=True)

    update_weights_from_disk = _method(weights.update_weights_from_disk)
    update_weights = _method(weights.update_weights)
    weights_checksum = _method(weights.weights_checksum)
    verify_weights = _method(weights.verify_weights)
    load_lora_adapter = _method(weights.load_lora_adapter)
    load_lora_adapter_from_tensors = _method(weights.load_lora_adapter_from_tensors)
    unload_lora_adapter = _method(weights.unload_lora_adapter)
    lora_adapters = _method(weights.lora_adapters)
    policies = _method(policy.policies)
    copy_policy = _method(policy.copy_policy)
    average_policy = _method(policy.average_policy)
    drop_policy = _method(policy.drop_policy)
    release_memory = _method(weights.release_memory)
    resume_memory = _method(weights.resume_memory)

    async def _run(self, operation: Operation[T]) -> T:
        if self._balancer is not None:
            return await self._send_to_any(for_any_server(operation), self._balancer)
        if isinstance(operation, Call):
            return await self._send(operation)
        advance: Callable[[], Call[Any] | float] = functools.partial(next, operation)
        try:
            while True:
                try:
                    step = advance()
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                try:
                    answer = await (self._send(step) if isinstance(step, Call) else asyncio.sleep(step))
                except BaseException as error:
                    advance = functools.partial(operation.throw, error)
                else:
                    advance = functools.partial(operation.send, answer)
        finally:
            # With the error that it may hold, and all that was sent.
            del advance

    async def _send_to_any(self, call: Call[T], balancer: Balancer) -> T:
        deadline = Deadline(self._total_s)
        for attempt in balancer.attempts(call.image_steps or 0):
            try:
                return await self.servers[attempt.index]._send(call, deadline)
            except FlowrollError as error:
                attempt.failed(error)
        raise AssertionError("a request that no server takes ends in an error")

    async def _send(self, call: Call[T], deadline: Deadline | None = None) -> T:
        self._reopen_after_fork(is_closed=self._http.is_closed)
        deadline = deadline or Deadline(self._total_s)
        timeout = call.timeout(self._timeout_s, deadline.left_s)
        is_unanswered = True
        try:
            async with (
                asyncio.timeout(deadline.left_s) as total,
                self._http.stream(
                    call.method, call.path, content=call.async_body(), headers=call.headers, timeout=timeout
                ) as response,
            ):
                is_unanswered = False
                body = AnswerBody(response, max_bytes=self._most_bytes(call), deadline=deadline)
                async for piece in response.aiter_bytes():
                    body.add(piece)
        except FAILURES as error:
            if total.expired():
                raise deadline.passed() from None
            raise self._route.failed(error, is_closed=self._http.is_closed, is_unanswered=is_unanswered) from error
        # Decoding a rollout takes long enough to hold up the caller's event loop.
        return await asyncio.to_thread(exchange.conclude, call, response, body.data, self._route.proxy)
