"""What a server is started with, resolved and checked once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flowroll.engine import AdapterLimits, BatchLimits, Limits
from flowroll.errors import InvalidRequestError
from flowroll.logs import LogFormat, LogLevel
from flowroll.types import Layout
from flowroll.wire.codec import WireFormat
from flowroll.wire.messages import Dialect

LoraMergeMode: TypeAlias = Literal["dynamic", "merge"]


_MAX_PORT = 65535
# The kernel counts milliseconds in 32 bits.
_MAX_SEND_S = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How to serve one checkpoint.

    Attributes:
        model: A diffusers checkpoint folder.
        variant: Variant of the model family; None: the family's first.
        dtype: "auto", "float32" or "bfloat16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        limits: What one request may ask for.
        batching: How much runs at once.
        adapter_limits: How many LoRA adapters it holds.
        layout: How the engine is spread over ranks.
        rank_timeout_s: How long ranks wait for each other before the server gives up.
        compile: Whether the transformer's blocks run compiled.
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
        max_queue: Requests that may wait behind those that run.
        max_control_queue: Checks of the weights (checksums, comparisons) at once; and as many changes of weights, adapters and
            memory, of which one goes on and the others wait.
        max_groups: Process groups of trainers that the server may be in, with those that it is joining.
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
        log_level: The level of the server's log, on standard error.
        log_format: Lines to read, or one JSON object a line.
        viewer: The store, or the folder of rollout files, that the pages at /viewer show; None: there are no such pages.
        otlp_endpoint: Where spans of requests are sent, by OTLP over HTTP, e.g. "http://127.0.0.1:4318/v1/traces"; None: spans
            are made only where the process has a tracer provider of the OpenTelemetry SDK already.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """

    model: str
    variant: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    batching: BatchLimits = field(default_factory=BatchLimits)
    adapter_limits: AdapterLimits = field(default_factory=AdapterLimits)
    layout: Layout = field(default_factory=Layout)
    rank_timeout_s: int | float = 60.0
    compile: bool = False
    host: str = "127.0.0.1"
    port: int = 30000
    allowed_hosts: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    wire_format: WireFormat = "json"
    wire_dialect: Dialect = "native"
    weights_roots: tuple[str, ...] = ()
    weight_group_hosts: tuple[str, ...] = ()
    max_connections: int = 1000
    max_queue: int = 64
    max_control_queue: int = 64
    max_groups: int = 16
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
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    cache_dir: str | None = None
    viewer: str | None = None
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        for root in self.weights_roots:
            _require(os.path.isdir(root), "weights_roots", "be folders that are there", root, "make it first")
        # Resolved once: what a link points to later is not what was allowed.
        object.__setattr__(self, "weights_roots", tuple(os.path.realpath(root) for root in self.weights_roots))
        in_range = 0 <= self.port <= _MAX_PORT
        _require(in_range, "port", f"lie in 0..{_MAX_PORT}", self.port, "use 0 to let the system choose")
        _require(self.max_connections > 0, "max_connections", "be > 0", self.max_connections, "leave it out")
        _require(self.max_queue >= 0, "max_queue", "be >= 0", self.max_queue, "use 0 to let none wait")
        _require(self.max_control_queue > 0, "max_control_queue", "be > 0", self.max_control_queue, "leave it out")
        _require(self.max_groups > 0, "max_groups", "be > 0", self.max_groups, "leave it out")
        _require(self.max_body_bytes > 0, "max_body_bytes", "be > 0", self.max_body_bytes, "leave it out")
        _require(self.max_score_body_bytes > 0, "max_score_body_bytes", "be > 0", self.max_score_body_bytes, "leave it out")
        _require(
            self.max_weights_body_bytes > 0, "max_weights_body_bytes", "be > 0", self.max_weights_body_bytes, "leave it out"
        )
        _require(self.weights_idle_s > 0, "weights_idle_s", "be > 0", self.weights_idle_s, "leave it out")
        _require(self.rank_timeout_s > 0, "rank_timeout_s", "be > 0", self.rank_timeout_s, "leave it out")
        _require(
            0 < self.send_timeout_s <= _MAX_SEND_S,
            "send_timeout_s",
            f"lie in 0..{_MAX_SEND_S}",
            self.send_timeout_s,
            "leave it out",
        )
        rate = self.min_send_bytes_per_s
        _require(rate > 0, "min_send_bytes_per_s", "be > 0", rate, "use 1 to wait for any client that takes something")
        _require(self.max_unsent_bytes > 0, "max_unsent_bytes", "be > 0", self.max_unsent_bytes, "leave it out")
        _require(self.receive_timeout_s > 0, "receive_timeout_s", "be > 0", self.receive_timeout_s, "leave it out")
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
        raise InvalidRequestError(f"{name} must {rule}, got {value}; {remedy}.", field=name)
