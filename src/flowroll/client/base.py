"""What both clients are made of: the route to one server with its connections, or the clients of several servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from flowroll.client.balancing import Balancer
from flowroll.client.bounds import MAX_ANSWER_BYTES
from flowroll.client.exchange import DEFAULT_TIMEOUT_S, Call
from flowroll.client.route import check_timeout, check_urls, check_wire_format, route_to
from flowroll.types import Number
from flowroll.wire.codec import WireFormat

HttpT = TypeVar("HttpT")
TransportT = TypeVar("TransportT")
_SECONDS_PER_TIMEOUT = 6


class ClientBase(Generic[HttpT, TransportT]):
    """Checks the arguments of a client and holds its connections; see `Client` for arguments, attributes and errors."""

    _http_class: ClassVar[type[Any]]
    _http: HttpT
    servers: tuple[Any, ...]

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        timeout_s: Number = DEFAULT_TIMEOUT_S,
        total_timeout_s: Number | None = None,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        wire_format: WireFormat = "msgpack",
        proxy: str | None = None,
        transport: TransportT | None = None,
    ) -> None:
        self._timeout_s = check_timeout(timeout_s)
        self._total_s = _SECONDS_PER_TIMEOUT * self._timeout_s if total_timeout_s is None else check_timeout(total_timeout_s)
        self._max_answer_bytes = max_answer_bytes
        self._wire_format: WireFormat = check_wire_format(wire_format)
        self._balancer: Balancer | None = None
        self.servers = (self,)
        if not isinstance(base_url, str):
            self.servers = tuple(
                type(self)(
                    url,
                    api_key=api_key,
                    timeout_s=timeout_s,
                    total_timeout_s=total_timeout_s,
                    max_answer_bytes=max_answer_bytes,
                    wire_format=wire_format,
                    proxy=proxy,
                    transport=transport,
                )
                for url in check_urls(base_url)
            )
            self._balancer = Balancer(len(self.servers))
            return
        self._route = route_to(base_url, api_key=api_key, proxy=proxy, has_transport=transport is not None)
        self._transport = transport
        self._open()

    def _open(self) -> None:
        self._http, self._pid = self._route.open(self._http_class, self._transport), os.getpid()

    def _reopen_after_fork(self, *, is_closed: bool) -> None:
        if self._pid != os.getpid() and not is_closed:
            # After a fork the connections are the parent's too: both would read parts of each other's answers.
            self._open()

    def _most_bytes(self, call: Call[Any]) -> int:
        return self._max_answer_bytes if call.max_bytes is None else call.max_bytes
