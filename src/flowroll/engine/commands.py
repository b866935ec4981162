"""What rank 0 tells the ranks that follow it. JSON, and tensors by broadcast; nothing is pickled."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from flowroll.engine.config import Limits
from flowroll.engine.rest import SleepMode
from flowroll.engine.tensorfile import FileStamp
from flowroll.families import ModelSpec
from flowroll.types import DenoisingEnv, EnvValue, LoraAdapter, SamplingParams, SamplingRecord

# What a follower announces once it has read new weights, or has memory for them: nothing, or why it could not.
STAGED = "staged"


class TensorShape(msgspec.Struct, frozen=True):
    """A tensor whose data follows by broadcast."""

    shape: tuple[int, ...]
    dtype: str

    def empty(self, device: torch.device) -> Tensor:
        """Memory for it."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype.removeprefix("torch.")), device=device)


class BranchShape(msgspec.Struct, frozen=True):
    """The arguments of one guidance branch."""

    tensors: dict[str, TensorShape]
    plain: dict[str, Any]


class Serve(msgspec.Struct, frozen=True, tag=True):
    """The first command: what the follower cannot see for itself."""

    spec: ModelSpec
    limits: Limits


class Request(msgspec.Struct, frozen=True, tag=True):
    """A planned request begins; the tensors of its environment follow by broadcast."""

    params: SamplingParams
    positive: BranchShape
    negative: BranchShape | None


class Sample(msgspec.Struct, frozen=True, tag=True):
    """A sample of that request begins."""

    seed: int


class Score(msgspec.Struct, frozen=True, tag=True):
    """Steps of one sample are to be scored; its environment and the states before the steps follow by broadcast."""

    record: SamplingRecord
    sde_step_indices: tuple[int, ...] | None
    steps: tuple[int, ...]
    latents: TensorShape
    positive: BranchShape
    negative: BranchShape | None


class StageWeights(msgspec.Struct, frozen=True, tag=True):
    """New weights of the transformer are to be read beside the old; every follower says whether it could."""

    files: list[str]
    # Those that rank 0 has read; another save is refused.
    stamps: tuple[FileStamp, ...]
    config: str | None


class StageAdapter(msgspec.Struct, frozen=True, tag=True):
    """An adapter is to be read beside those that are loaded; every follower says whether it could, and found the same."""

    folder: str
    about: LoraAdapter


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """An adapter is to be forgotten."""

    name: str


class ReleaseMemory(msgspec.Struct, frozen=True, tag=True):
    """The weights are to be kept elsewhere; every follower copies them and says whether it could."""

    mode: SleepMode


class ResumeMemory(msgspec.Struct, frozen=True, tag=True):
    """The weights are to be made again; every follower says whether it could."""


class PrepareWeights(msgspec.Struct, frozen=True, tag=True):
    """New weights of the transformer will be broadcast, in this order; every follower says whether it has the memory."""

    tensors: dict[str, TensorShape]


class FillWeights(msgspec.Struct, frozen=True, tag=True):
    """Every rank has: they come now."""


class CommitWeights(msgspec.Struct, frozen=True, tag=True):
    """Every rank could: what was staged takes the place of the old."""


class DropWeights(msgspec.Struct, frozen=True, tag=True):
    """A rank could not: nobody takes them."""


class GatherWeights(msgspec.Struct, frozen=True, tag=True):
    """The sharded weights are gathered, one after the other in the order of their names."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """No more commands."""


Command: TypeAlias = (
    Serve
    | Request
    | Sample
    | Score
    | StageWeights
    | StageAdapter
    | UnloadAdapter
    | ReleaseMemory
    | ResumeMemory
    | PrepareWeights
    | FillWeights
    | CommitWeights
    | DropWeights
    | GatherWeights
    | Stop
)
_DECODER = msgspec.json.Decoder(Command)


def encode_command(command: Command) -> str:
    """The command as text."""
    return msgspec.json.encode(command).decode()


def decode_command(data: bytes) -> Command:
    """The command in these bytes."""
    command: Command = _DECODER.decode(data)
    return command


def describe_tensor(tensor: Tensor) -> TensorShape:
    """A tensor without its data."""
    return TensorShape(shape=tuple(tensor.shape), dtype=str(tensor.dtype))


def describe_branch(branch: dict[str, EnvValue]) -> BranchShape:
    """A branch without the data of its tensors."""
    return BranchShape(
        tensors={key: describe_tensor(value) for key, value in branch.items() if isinstance(value, Tensor)},
        plain={key: value for key, value in branch.items() if not isinstance(value, Tensor)},
    )


def empty_env(command: Request | Score, device: torch.device) -> DenoisingEnv:
    """The environment that a command describes, with memory for its tensors."""

    def branch(shape: BranchShape) -> dict[str, EnvValue]:
        return {**{key: tensor.empty(device) for key, tensor in shape.tensors.items()}, **shape.plain}

    negative = None if command.negative is None else branch(command.negative)
    return DenoisingEnv(pos_cond_kwargs=branch(command.positive), neg_cond_kwargs=negative)


def env_tensors(env: DenoisingEnv) -> list[Tensor]:
    """The tensors of an environment, in the same order on every rank."""
    branches = [env.pos_cond_kwargs, env.neg_cond_kwargs or {}]
    return [branch[key] for branch in branches for key in sorted(branch) if isinstance(branch[key], Tensor)]  # type: ignore[misc]
