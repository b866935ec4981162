"""What a server is started with, resolved and checked once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flowroll.engine.service import EngineOptions
from flowroll.types.rules import refuse
from flowroll.wire.codec import WireFormat
from flowroll.wire.messages import Dialect

LoraMergeMode: TypeAlias = Literal["dynamic", "merge"]
_MAX_PORT = 65535
# The kernel counts milliseconds in 32 bits.
_MAX_SEND_S = 10**6
_ABOVE_ZERO = (
    *("max_connections", "max_control_queue", "max_groups", "max_body_bytes", "max_score_body_bytes", "max_weights_body_bytes"),
    *("weights_idle_s", "rank_timeout_s", "max_unsent_bytes", "receive_timeout_s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(EngineOptions):
    """How to serve one checkpoint: the options of its engine, and those of the server around it.

    Attributes:
        host: Address to listen on.
        allowed_hosts: Names, besides those of this machine, by which requests may call a server on loopback, and from whose
            pages a browser may send them; "*": every one. Where the server listens on more than loopback and there are some,
            requests have to call it by one of them or by its address.
        port: 0 lets the system choose; the address is in the start-up message.
        api_key: Bearer token that every route but /liveness demands; None: open. Never shown.
        wire_format: Answer to `Accept: */*`.
        wire_dialect: Names in the answer where the request does not choose.
        weights_roots: Folders, absolute, from which clients may have weights read; none: no client may.
        weight_group_hosts: Hosts, besides this machine, whose process groups clients may have the server join; "*": every one.
        max_connections: TCP connections at once; more are answered with 429 and ended.
        max_control_queue: Checks of the weights (checksums, comparisons) at once; and as many changes of weights, adapters and
            memory, of which one goes on and the others wait.
        max_body_bytes: Size of a request body, without the tensors in it.
        max_score_body_bytes: Size of a body of POST /rollout/score, which carries latents and environments: 0.4 GiB for 16
            samples of 10 steps of Qwen-Image at 1024 x 1024; and of a body of POST /rollout/generate and /generate, which may
            carry latents and embeddings.
        send_timeout_s: Seconds for which a client may take no byte of its answer before its connection is broken off (Linux).
        min_send_bytes_per_s: Bytes of its answer that a client has to take in a second, in the long run; a slower one loses its
            connection.
        max_unsent_bytes: Bytes of all answers together that are expected by accepted requests or not sent to their end, and of
            the tensors that these requests have brought; beyond it no request is accepted.
        max_weights_body_bytes: Size of a body with tensors of new weights. What is held is bounded by the module's own size.
        weights_idle_s: Seconds of silence after which an update that arrives in buckets is dropped, or, if its buckets are put
            in place one by one, samples start again: its trainer may be dead.
        allow_pickle_weights: Whether POST /update_weights_from_tensor is open; wire/pickled.py says what its clients are
            trusted with.
        lora_merge_mode: How an adapter runs that a trainer pushes: "dynamic": beside the weights, with the bits of its peft
            model; "merge": added to a copy of the weights that it changes, which is faster.
        receive_timeout_s: Seconds that a request's headers may take to come, and its body, which gets another second for every
            64 KiB of it; what is slower is answered with 408. A connection may idle as long between two requests.
        grace_s: Seconds that accepted requests get to finish once the server is told to stop.
        viewer: The store, or the folder of rollout files, that the pages at /viewer show; None: there are no such pages.
        otlp_endpoint: Where spans of requests are sent, by OTLP over HTTP, e.g. "http://127.0.0.1:4318/v1/traces"; None: spans
            are made only where the process has a tracer provider of the OpenTelemetry SDK already.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    allowed_hosts: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    wire_format: WireFormat = "json"
    wire_dialect: Dialect = "native"
    weights_roots: tuple[str, ...] = ()
    weight_group_hosts: tuple[str, ...] = ()
    max_connections: int = 1000
    max_body_bytes: int = 4 * 2**20
    max_score_body_bytes: int = 2**30
    send_timeout_s: int | float = 60.0
    min_send_bytes_per_s: int = 256 * 1024
    max_unsent_bytes: int = 16 * 2**30
    max_weights_body_bytes: int = 8 * 2**30
    weights_idle_s: int | float = 60.0
    allow_pickle_weights: bool = False
    lora_merge_mode: LoraMergeMode = "dynamic"
    receive_timeout_s: int | float = 20.0
    grace_s: int | float = 5.0
    viewer: str | None = None
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for root in self.weights_roots:
            _require(os.path.isdir(root), "weights_roots", "be folders that are there", root, "make it first")
        # Resolved once: what a link points to later is not what was allowed.
        object.__setattr__(self, "weights_roots", tuple(os.path.realpath(root) for root in self.weights_roots))
        in_range = 0 <= self.port <= _MAX_PORT
        _require(in_range, "port", f"lie in 0..{_MAX_PORT}", self.port, "use 0 to let the system choose")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            _require(value > 0, name, "be > 0", value, "leave it out")
        _require(self.max_queue >= 0, "max_queue", "be >= 0", self.max_queue, "use 0 to let none wait")
        send_s = self.send_timeout_s
        _require(0 < send_s <= _MAX_SEND_S, "send_timeout_s", f"lie in 0..{_MAX_SEND_S}", send_s, "leave it out")
        rate = self.min_send_bytes_per_s
        _require(rate > 0, "min_send_bytes_per_s", "be > 0", rate, "use 1 to wait for any client that takes something")
        _require(self.grace_s >= 0, "grace_s", "be >= 0", self.grace_s, "use 0 to stop at once")
        viewer = self.viewer
        _require(viewer is None or os.path.isdir(viewer), "viewer", "be a folder that is there", viewer, "make it first")
        url = self.otlp_endpoint
        url_ok = url is None or url.startswith(("http://", "https://"))
        _require(url_ok, "otlp_endpoint", "be an http or https URL", url, "use http://host:4318/v1/traces")
        key_ok = self.api_key is None or (self.api_key != "" and self.api_key.isprintable() and self.api_key.isascii())
        _require(key_ok, "api_key", "be printable ASCII text", "something else", "choose another token")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _require(ok: bool, name: str, rule: str, value: object, remedy: str) -> None:
    if not ok:
        refuse(name, rule, value, remedy)
