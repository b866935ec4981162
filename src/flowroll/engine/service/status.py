"""What a server may know of its engine: facts that never change, and its state at one moment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from flowroll.engine.config import EngineInfo
from flowroll.engine.facts import ModelFacts
from flowroll.engine.scheduler import BatchLimits, LoadStats, RequestCounts
from flowroll.engine.weights.offload import SleepMode
from flowroll.types import ModuleName

# What shows that an engine can generate.
Evidence: TypeAlias = Literal["recent", "running", "paused", "updating", "asleep", "probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What never changes while an engine runs.

    Attributes:
        info: What is loaded, and how.
        model: What requests are checked and planned with.
        batching: How much runs at once.
        modules: The parts of the checkpoint that have weights.
        pid: The process of the engine; rank 0's.
        memory: How much memory the samples that run at once can take, in words.
        gpu_uuid: The GPU of rank 0, as CUDA names it; None on a CPU.
    """

    info: EngineInfo
    model: ModelFacts
    batching: BatchLimits
    modules: tuple[str, ...]
    pid: int
    memory: str
    gpu_uuid: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """An engine at one moment.

    Attributes:
        load: What runs and what ran.
        oldest_waiting_s: How long the first request in line has waited; 0 where none waits.
        weight_version: Version of the weights in memory.
        memory_mode: Where the weights are kept while their memory is released; None: they are in place.
        is_alive: Whether the engine's threads run.
        is_accepting: False once the service was told to drain, or a thread died. A pause refuses requests too, but ends.
    """

    load: LoadStats
    oldest_waiting_s: float
    weight_version: str
    memory_mode: SleepMode | None
    is_alive: bool
    is_accepting: bool

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of the weights is released."""
        return self.memory_mode is not None

    @property
    def counts(self) -> RequestCounts:
        """The counters of all requests, those to recompute log-probs among them."""
        one, other = self.load.requests, self.load.log_probs
        return RequestCounts(
            **{field.name: getattr(one, field.name) + getattr(other, field.name) for field in fields(RequestCounts)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedUpdate:
    """An update of weights whose tensors may come now.

    Attributes:
        update_id: Names it.
        module: The module that the weights are for.
        names: The names of the module's tensors.
        num_bytes: The bytes of the module's tensors, in the dtype of the weights.
    """

    update_id: str
    module: ModuleName
    names: frozenset[str]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateProgress:
    """How much of an update has arrived.

    Attributes:
        num_arrived: Tensors that have arrived.
        num_tensors: Tensors of the module.
        weight_version: Version of the weights in memory, which the update has not touched.
    """

    num_arrived: int
    num_tensors: int
    weight_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SentNames:
    """Tensors that another process holds ready.

    Attributes:
        sent_id: Names them.
        names: The names of the tensors, in their order.
    """

    sent_id: str
    names: tuple[str, ...]
