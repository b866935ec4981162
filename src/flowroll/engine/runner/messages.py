"""What rank 0 tells the other ranks. Each message is small JSON; tensors follow it by broadcast. Nothing is pickled."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.weights.offload import SleepMode
from flowroll.engine.weights.tensorfile import FileStamp
from flowroll.families import ModelSpec
from flowroll.types import DenoisingEnv, LoraAdapter, SamplingParams, SamplingRecord
from flowroll.types.results import replace_tensors


class TensorShape(msgspec.Struct, frozen=True):
    """A tensor whose data follows by broadcast."""

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
    """A denoising environment, whose tensors are given as shapes. No value of an environment is an object itself."""

    image_kwargs: dict[str, Any]
    pos_cond_kwargs: dict[str, Any]
    neg_cond_kwargs: dict[str, Any] | None
    guidance: TensorShape | None

    @classmethod
    def of(cls, env: DenoisingEnv) -> EnvShape:
        """Describes an environment."""
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
    """The first message: what a rank cannot see for itself."""

    spec: ModelSpec
    limits: Limits


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Be ready for the samples of a request. The tensors of its environment follow."""

    id: int
    params: SamplingParams
    env: EnvShape


class StartSample(msgspec.Struct, frozen=True, tag=True):
    """Draw the initial noise of a sample."""

    id: int
    request: int
    seed: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """Take a step of these samples, in one forward, with so many CPU threads."""

    samples: tuple[int, ...]
    num_threads: int


class DropRequest(msgspec.Struct, frozen=True, tag=True):
    """Forget a request and its samples."""

    id: int


class BeginRecomputation(msgspec.Struct, frozen=True, tag=True):
    """Be ready to run recorded steps again. The tensors of the environment and the states before the steps follow."""

    id: int
    record: SamplingRecord
    sde_step_indices: tuple[int, ...] | None
    steps: tuple[int, ...]
    latents: TensorShape
    env: EnvShape


class Recompute(msgspec.Struct, frozen=True, tag=True):
    """Run one of these steps again, with so many CPU threads."""

    id: int
    row: int
    num_threads: int


class EndRecomputation(msgspec.Struct, frozen=True, tag=True):
    """Forget these steps."""

    id: int


class StageWeights(msgspec.Struct, frozen=True, tag=True):
    """Read new weights of the transformer beside the old ones, and say whether that went well.

    `stamps` are those of the files that rank 0 has read; another save is refused.
    """

    files: list[str]
    stamps: tuple[FileStamp, ...]
    config: str | None


class StageTensors(msgspec.Struct, frozen=True, tag=True):
    """Make room for new weights of the transformer, which will be broadcast in this order, and say whether there is any."""

    tensors: dict[str, TensorShape]


class ReceiveTensors(msgspec.Struct, frozen=True, tag=True):
    """Every rank has room: the weights come now."""


class StageAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read an adapter beside those that are loaded, and say whether that went well and it is the same."""

    folder: str
    about: LoraAdapter


class StageRelease(msgspec.Struct, frozen=True, tag=True):
    """Copy the weights to where they are kept while the engine sleeps, and say whether that went well."""

    mode: SleepMode


class StageResume(msgspec.Struct, frozen=True, tag=True):
    """Make the weights again, and say whether that went well."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Every rank could: what was staged takes effect."""


class DropStaged(msgspec.Struct, frozen=True, tag=True):
    """A rank could not: what was staged is forgotten."""


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget an adapter."""

    name: str


class GatherWeights(msgspec.Struct, frozen=True, tag=True):
    """Gather the sharded weights, one after the other in the order of their names."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """No more messages."""


Message: TypeAlias = (
    Serve
    | AddRequest
    | StartSample
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
    | GatherWeights
    | Stop
)
_DECODER = msgspec.json.Decoder(Message)


def encode_message(message: Message) -> str:
    """Writes a message as text."""
    return msgspec.json.encode(message).decode()


def decode_message(data: bytes) -> Message:
    """Reads a message."""
    message: Message = _DECODER.decode(data)
    return message
