"""What a server can know about its engine: facts that do not change while it runs, and its state at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from flowroll.engine.config import EngineInfo
from flowroll.engine.facts import ModelFacts
from flowroll.engine.scheduler import BatchLimits, LoadStats, RequestCounts
from flowroll.engine.weights.offload import SleepMode
from flowroll.exact import GraphCounts
from flowroll.types import ModuleName

# The kinds of evidence that an engine can generate.
Evidence: TypeAlias = Literal["recent", "running", "paused", "updating", "asleep", "probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The facts about an engine that do not change while it runs.

    Attributes:
        info: What is loaded, and how.
        model: The facts about the model that requests are checked and planned with.
        batching: The limits of what runs at the same time.
        modules: The names of the modules of the checkpoint that have weights.
        pid: The process id of the engine's rank 0.
        memory: A text that says how much memory the samples that run at the same time can take.
        gpu_uuid: The UUID of rank 0's GPU, as CUDA gives it; None on a CPU.
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
    """The state of an engine at one moment.

    Attributes:
        load: The numbers of requests and samples that run and have run.
        oldest_waiting_s: How many seconds the first waiting request has waited; 0 if none waits.
        weight_version: The version of the weights in memory.
        version_number: Its number in the sequence of all versions.
        memory_mode: Where the weights are kept while their memory is released; None if they are in place.
        graphs: What became of the forwards that may be recorded.
        world_size: How many members of a trainer's process group it is: 1, or one for each replica of a fleet.
        is_alive: Whether the engine's threads run.
        is_accepting: Whether requests are accepted: False once the service drains or a thread has died. A pause, which also
            refuses requests but ends, does not change it.
    """

    load: LoadStats
    oldest_waiting_s: float
    weight_version: str
    version_number: int
    memory_mode: SleepMode | None
    graphs: GraphCounts = field(default_factory=GraphCounts)
    world_size: int = 1
    is_alive: bool
    is_accepting: bool

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of the weights is released."""
        return self.memory_mode is not None

    @property
    def counts(self) -> RequestCounts:
        """The numbers of all requests, including those to recompute log-probs."""
        one, other = self.load.requests, self.load.log_probs
        return RequestCounts(
            **{field.name: getattr(one, field.name) + getattr(other, field.name) for field in fields(RequestCounts)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedUpdate:
    """An update of weights that has been opened and accepts tensors.

    Attributes:
        update_id: The id of the update.
        module: The module that the weights are for.
        names: The names of the module's tensors.
        num_bytes: The number of bytes of the module's tensors, in the dtype of the weights.
    """

    update_id: str
    module: ModuleName
    names: frozenset[str]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateProgress:
    """How much of an update has arrived.

    Attributes:
        num_arrived: The number of tensors that have arrived.
        num_tensors: The number of the module's tensors.
        weight_version: The version of the weights in memory, which the update has not changed.
    """

    num_arrived: int
    num_tensors: int
    weight_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SentNames:
    """The names of tensors that another process has shared.

    Attributes:
        sent_id: The id of the shared tensors.
        names: The names of the tensors, in their order.
    """

    sent_id: str
    names: tuple[str, ...]
