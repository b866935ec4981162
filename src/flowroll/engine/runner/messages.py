"""The messages from rank 0 to the other ranks. Each is small JSON; its tensors follow by broadcast. Nothing is pickled."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.starts import PlannedSample
from flowroll.engine.weights.offload import SleepMode
from flowroll.engine.weights.tensorfile import FileStamp
from flowroll.families import ModelSpec
from flowroll.types import DenoisingEnv, LoraAdapter, ReferenceImage, SamplingParams, SamplingRecord
from flowroll.types.results import replace_tensors


class TensorShape(msgspec.Struct, frozen=True):
    """The shape and dtype of a tensor whose data follows by broadcast."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """Describes a tensor without its data."""
        return cls(shape=tuple(tensor.shape), dtype=str(tensor.dtype))

    def empty(self, device: torch.device) -> Tensor:
        """Allocates memory for the tensor."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype.removeprefix("torch.")), device=device)


class EnvShape(msgspec.Struct, frozen=True):
    """A denoising environment with a `TensorShape` in place of each tensor.

    No value of an environment is itself a JSON object, so in the decoded JSON every object is a `TensorShape`.
    """

    image_kwargs: dict[str, Any]
    pos_cond_kwargs: dict[str, Any]
    neg_cond_kwargs: dict[str, Any] | None
    guidance: TensorShape | None

    @classmethod
    def of(cls, env: DenoisingEnv) -> EnvShape:
        """Describes an environment without the data of its tensors."""
        return cls(**replace_tensors({name: getattr(env, name) for name in cls.__struct_fields__}, TensorShape.of))

    def empty(self, device: torch.device) -> DenoisingEnv:
        """Allocates memory for the tensors of the environment."""

        def value(described: Any) -> Any:
            if isinstance(described, dict):
                return msgspec.convert(described, TensorShape).empty(device)
            return [value(item) for item in described] if isinstance(described, list) else described

        def branch(values: dict[str, Any] | None) -> Any:
            return None if values is None else {key: value(described) for key, described in values.items()}

        return DenoisingEnv(
            image_kwargs=branch(self.image_kwargs),
            pos_cond_kwargs=branch(self.pos_cond_kwargs),
            neg_cond_kwargs=branch(self.neg_cond_kwargs),
            guidance=None if self.guidance is None else self.guidance.empty(device),
        )


class Serve(msgspec.Struct, frozen=True, tag=True):
    """The first message, with what a rank cannot find out by itself: the facts that shape the latents, and the limits."""

    spec: ModelSpec
    limits: Limits


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Prepare for the samples of a request. The tensors of its environment follow, then the latents that they start from."""

    id: int
    params: SamplingParams
    env: EnvShape
    latents: TensorShape | None
    start_step: int
    images: tuple[ReferenceImage, ...]


class StartSample(msgspec.Struct, frozen=True, tag=True):
    """Draw the initial noise of a sample."""

    id: int
    request: int
    planned: PlannedSample


class StartChild(msgspec.Struct, frozen=True, tag=True):
    """Start a child of a sample at a fork, with the step of the fork."""

    id: int
    request: int
    planned: PlannedSample
    parent: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """Take a step of these samples, in one forward, with this number of CPU threads."""

    samples: tuple[int, ...]
    num_threads: int


class DropRequest(msgspec.Struct, frozen=True, tag=True):
    """Forget a request and its samples."""

    id: int


class BeginRecomputation(msgspec.Struct, frozen=True, tag=True):
    """Prepare to run recorded steps again. The tensors of the environment and the latents before the steps follow."""

    id: int
    record: SamplingRecord
    sde_step_indices: tuple[int, ...] | None
    steps: tuple[int, ...]
    latents: TensorShape
    env: EnvShape


class Recompute(msgspec.Struct, frozen=True, tag=True):
    """Run one of the recorded steps again, with this number of CPU threads."""

    id: int
    row: int
    num_threads: int


class EndRecomputation(msgspec.Struct, frozen=True, tag=True):
    """Forget the recorded steps of a recomputation."""

    id: int


class StageWeights(msgspec.Struct, frozen=True, tag=True):
    """Read new weights of the transformer beside the old ones, and report whether that succeeded.

    `stamps` identify the files that rank 0 has read; a rank that finds other files refuses them.
    """

    files: list[str]
    stamps: tuple[FileStamp, ...]
    config: str | None


class StageTensors(msgspec.Struct, frozen=True, tag=True):
    """Allocate memory for new transformer weights, which are broadcast in this order, and report whether that succeeded."""

    tensors: dict[str, TensorShape]


class ReceiveTensors(msgspec.Struct, frozen=True, tag=True):
    """Receive the new weights by broadcast; every rank has allocated memory for them."""


class StageAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read an adapter beside the loaded ones, and report whether that succeeded and it is the adapter that rank 0 has read."""

    config: str
    weights: str
    about: LoraAdapter


class StageRelease(msgspec.Struct, frozen=True, tag=True):
    """Copy the weights to where they are kept while the engine sleeps, and report whether that succeeded."""

    mode: SleepMode


class StageResume(msgspec.Struct, frozen=True, tag=True):
    """Load the kept weights into memory again, and report whether that succeeded."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Put the staged change into effect; every rank has prepared it."""


class DropStaged(msgspec.Struct, frozen=True, tag=True):
    """Drop the staged change, because a rank could not prepare it."""


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Remove an adapter."""

    name: str


class StagePolicy(msgspec.Struct, frozen=True, tag=True):
    """Copy or average held weights, and report whether that succeeded.

    `source` is the other set; null: the weights in place. `decay` is the policy's own share; null: it becomes a copy.
    """

    name: str
    source: str | None
    decay: float | None


class StagePolicyAdapter(msgspec.Struct, frozen=True, tag=True):
    """Copy or average an adapter, and report whether that succeeded."""

    name: str
    source: str
    decay: float | None
    version: str


class StageExchange(msgspec.Struct, frozen=True, tag=True):
    """Make ready to put held weights in place, or, for null, those that the engine was last given; report if that succeeded."""

    name: str | None


class DropPolicy(msgspec.Struct, frozen=True, tag=True):
    """Forget held weights."""

    name: str


class GatherWeights(msgspec.Struct, frozen=True, tag=True):
    """Gather these weights, as far as they are sharded, one after the other, in the order of their names."""

    names: tuple[str, ...]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End; no more messages follow."""


Message: TypeAlias = (
    Serve
    | AddRequest
    | StartSample
    | StartChild
    | Step
    | DropRequest
    | BeginRecomputation
    | Recompute
    | EndRecomputation
    | StageWeights
    | StageTensors
    | ReceiveTensors
    | StageAdapter
    | StageRelease
    | StageResume
    | Commit
    | DropStaged
    | UnloadAdapter
    | StagePolicy
    | StagePolicyAdapter
    | StageExchange
    | DropPolicy
    | GatherWeights
    | Stop
)
_DECODER = msgspec.json.Decoder(Message)


def encode_message(message: Message) -> str:
    """Encodes a message as JSON text."""
    return msgspec.json.encode(message).decode()


def decode_message(data: bytes) -> Message:
    """Decodes a message from JSON."""
    message: Message = _DECODER.decode(data)
    return message
