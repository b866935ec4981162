"""The blocking client."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
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
) -> Callable[Concatenate[Client, P], T]:
    """Makes the method of `Client` for an operation of `calls` or `weights`, with its parameters and its documentation.

    Args:
        operation: What the method does.
        of_each: Whether a client of several servers does it with each of them, one after the other.
    """

    @functools.wraps(operation)
    def method(self: Client, /, *args: P.args, **values: P.kwargs) -> T:
        for server in self.servers[:-1] if of_each else ():
            server._run(operation(self._wire_format, *args, **values))
        if of_each:
            self = self.servers[-1]
        return self._run(operation(self._wire_format, *args, **values))

    return method


class Client(ClientBase[httpx.Client, httpx.BaseTransport]):
    """Talks to one flowroll server. Threads may share it. It is a context manager: `close` closes its connections.

    With msgpack, the large tensors of an answer lie in one buffer, which lives as long as any of them: clone what you keep
    of an answer whose rest you drop.

    Args:
        base_url: The server's URL, e.g. "http://127.0.0.1:30000". Or a list of URLs of servers with the same model and weights:
            each request then goes whole to the server with the least work in flight (image-steps), and to another one if that
            cannot be reached, does not take it now, or ends before a byte of its answer has come. Everything else is done with
            one server at a time: `for server in client.servers: server.update_weights(...)`.
        api_key: The server's bearer token, if it demands one.
        timeout_s: The longest silence of the server, in seconds; the server sends nothing while it makes a rollout.
        total_timeout_s: The most seconds that a call may take in all, looked at whenever something is sent or comes; None: six
            times `timeout_s`.
        max_answer_bytes: The most bytes of an answer with tensors.
        wire_format: "msgpack", or "json", which is larger and slower, and easy to look at.
        proxy: The URL of a proxy on the way to the server, or "direct" for none. None: the environment's proxy (`http_proxy`,
            `https_proxy`, `all_proxy`, `no_proxy`). A server on this machine (127.0.0.0/8, ::1, localhost) is always reached
            directly.
        transport: Another httpx transport, e.g. to an app in this process.

    Attributes:
        servers: The clients of the single servers; of one URL, the client itself alone.

    Raises:
        InvalidRequestError: An argument breaks its rule, or the URL, the key or the proxy cannot be used in HTTP.
        MissingExtraError: The library for a SOCKS proxy is not installed.
    """

    servers: tuple[Client, ...]
    _http_class = httpx.Client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. It may be called twice."""
        if self._balancer is None:
            self._http.close()
            return
        for server in self.servers:
            server.close()

    rollout = _method(calls.rollout)
    generate = _method(calls.generate)
    score = _method(calls.score)
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

    def _run(self, operation: Operation[T]) -> T:
        if self._balancer is not None:
            return self._send_to_any(for_any_server(operation), self._balancer)
        if isinstance(operation, Call):
            return self._send(operation)
        advance: Callable[[], Call[Any] | float] = functools.partial(next, operation)
        try:
            while True:
                try:
                    step = advance()
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                try:
                    answer = self._perform(step)
                except BaseException as error:
                    advance = functools.partial(operation.throw, error)
                else:
                    advance = functools.partial(operation.send, answer)
        finally:
            # With the error that it may hold, and all that was sent.
            del advance

    def _perform(self, step: Call[Any] | float) -> Any:
        if isinstance(step, Call):
            return self._send(step)
        time.sleep(step)
        return None

    def _send_to_any(self, call: Call[T], balancer: Balancer) -> T:
        deadline = Deadline(self._total_s)
        for attempt in balancer.attempts(call.image_steps or 0):
            try:
                return self.servers[attempt.index]._send(call, deadline)
            except FlowrollError as error:
                attempt.failed(error)
        raise AssertionError("a request that no server takes ends in an error")

    def _send(self, call: Call[T], deadline: Deadline | None = None) -> T:
        self._reopen_after_fork(is_closed=self._http.is_closed)
        deadline = deadline or Deadline(self._total_s)
        timeout = call.timeout(self._timeout_s, deadline.left_s)
        is_unanswered = True
        try:
            with self._http.stream(
                call.method, call.path, content=call.body(deadline), headers=call.headers, timeout=timeout
            ) as response:
                is_unanswered = False
                body = AnswerBody(response, max_bytes=self._most_bytes(call), deadline=deadline)
                for piece in response.iter_bytes():
                    body.add(piece)
        except FAILURES as error:
            raise self._route.failed(error, is_closed=self._http.is_closed, is_unanswered=is_unanswered) from error
        return exchange.conclude(call, response, body.data, self._route.proxy)
