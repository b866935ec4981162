"""What the process of a server and the process of its engine say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowroll.engine.config import AdapterLimits, Limits
from flowroll.engine.scheduler import BatchLimits, StageSpan
from flowroll.engine.service.status import EngineFacts
from flowroll.errors import FlowrollError
from flowroll.logs import LogFormat, LogLevel
from flowroll.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is started; the first message to its process.

    Attributes:
        model: The checkpoint folder.
        variant: Variant of the model family; None: the family's first.
        dtype: The dtype of the weights, or "auto".
        device: The device of rank 0, or "auto".
        layout: How the transformer is spread over ranks.
        limits: What one request may ask for.
        batching: How much runs at once.
        adapter_limits: How many LoRA adapters there may be.
        rank_timeout_s: How long ranks wait for each other.
        max_queue: Requests that may wait behind those that run.
        log_level: The level of the log.
        log_format: The form of its lines.
    """

    model: str
    variant: str | None
    dtype: str
    device: str
    layout: Layout
    limits: Limits
    batching: BatchLimits
    adapter_limits: AdapterLimits
    rank_timeout_s: float
    max_queue: int
    log_level: LogLevel
    log_format: LogFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine is up."""

    facts: EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The engine could not be started, or is down for good."""

    error: FlowrollError


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Call a method of the engine's service."""

    id: int
    method: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The caller of a request went away."""

    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a call has ended."""

    id: int
    result: Any
    error: BaseException | None
    spans: tuple[StageSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End what runs, then the process."""

    timeout_s: float
