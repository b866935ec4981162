"""The messages from rank 0 to the other ranks. Each is small JSON; its tensors follow by broadcast. Nothing is pickled.

Those that change the weights are in changes.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import msgspec

from flowroll.engine.config import Limits
from flowroll.engine.runner.changes import AnyChange
from flowroll.engine.runner.shapes import EnvShape, TensorShape
from flowroll.engine.starts import PlannedSample
from flowroll.families import ModelSpec
from flowroll.types import ReferenceImage, SamplingParams, SamplingRecord


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


class Recompute(msgspec.Struct, frozen=True, tag=True):
    """Run one recorded step again, with this number of CPU threads, under a policy; null: with the record's own adapter.

    The tensors of the environment and the latents before the step follow.
    """

    record: SamplingRecord
    sde_step_indices: tuple[int, ...] | None
    policy: str | None
    step: int
    latents: TensorShape
    env: EnvShape
    num_threads: int


class ReceiveTensors(msgspec.Struct, frozen=True, tag=True):
    """Receive the new weights by broadcast; every rank has made room for them."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Put the staged change into effect; every rank has prepared it."""


class DropStaged(msgspec.Struct, frozen=True, tag=True):
    """Drop the staged change, because a rank could not prepare it."""


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
    | Recompute
    | AnyChange
    | ReceiveTensors
    | Commit
    | DropStaged
    | GatherWeights
    | Stop
)


def _path(kind: type, text: str) -> Path:
    assert kind is Path
    return Path(text)


def _text(path: object) -> str:
    assert isinstance(path, Path)
    return str(path)


_DECODER = msgspec.json.Decoder(Message, dec_hook=_path)


def encode_message(message: Message) -> str:
    """Encodes a message as JSON text."""
    return msgspec.json.encode(message, enc_hook=_text).decode()


def decode_message(data: bytes) -> Message:
    """Decodes a message from JSON."""
    message: Message = _DECODER.decode(data)
    return message
