"""The messages between the process of a server and the process of its engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flowroll.engine.config import AdapterLimits, Graphs, Limits
from flowroll.engine.scheduler import BatchLimits, StageSpan
from flowroll.engine.service.status import EngineFacts
from flowroll.errors import FlowrollError
from flowroll.logs import LogFormat, LogLevel
from flowroll.types import Exactness, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options that an engine is started with; the first message to its process.

    Attributes:
        model: The checkpoint folder.
        variant: The variant of the model family; None: the family's first.
        dtype: "auto", "float32" or "bfloat16".
        device: The device of rank 0: "auto", "cpu", "cuda" or "cuda:N".
        layout: How the transformer is distributed over ranks.
        limits: The limits of one request.
        batching: The limits of what runs at the same time.
        adapter_limits: The limits of the LoRA adapters.
        rank_timeout_s: How long ranks wait for each other, in seconds.
        compile: Whether the transformer's blocks run compiled.
        graphs: Whether forwards of small samples are recorded where they can be.
        max_graph_bytes: The most memory that recordings take.
        exactness: "exact", or "fast" for an engine without any promise about bits; see `Engine`.
        fast_parts: What makes it fast; None: what the device has.
        max_queue: The number of requests that may wait behind those that run.
        max_control_queue: The number of checks of the weights that may be under way or wait.
        max_groups: The number of process groups of trainers that the engine may be in, with those that it is joining.
        log_level: The level of the log, on standard error.
        log_format: The format of the log's lines.
        cache_dir: The folder in which what is found about this machine's kernels is kept; None: the usual one.
    """

    model: str
    variant: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    layout: Layout = field(default_factory=Layout)
    limits: Limits = field(default_factory=Limits)
    batching: BatchLimits = field(default_factory=BatchLimits)
    adapter_limits: AdapterLimits = field(default_factory=AdapterLimits)
    rank_timeout_s: int | float = 60.0
    compile: bool = False
    graphs: Graphs = "auto"
    max_graph_bytes: int = 4 * 2**30
    exactness: Exactness = "exact"
    fast_parts: tuple[str, ...] | None = None
    max_queue: int = 64
    max_control_queue: int = 64
    max_groups: int = 16
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    cache_dir: str | None = None

    def arguments_of(self, call: Callable[..., Any]) -> dict[str, Any]:
        """Returns the options that a call has parameters for, by their names."""
        return {name: getattr(self, name) for name in inspect.signature(call).parameters if hasattr(self, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """To the server: the engine is up."""

    facts: EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """To the server: the engine could not be started, or is down for good."""

    error: FlowrollError


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """To the engine: call a method of its service."""

    id: int
    method: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """To the engine: cancel a request, because its caller has disconnected."""

    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To the server: the result or the error of a call."""

    id: int
    result: Any
    error: BaseException | None
    spans: tuple[StageSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """To the engine: end all requests, then the process."""

    timeout_s: float
