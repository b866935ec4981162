"""Answers <-> bytes: JSON with base64 tensors, or msgpack with raw ones.

The structure is encoded with a placeholder for every tensor; the placeholders are then replaced by the tensors' own
storage, so a body is a list of buffers and no tensor is copied before it is sent. Decoding reads a writable msgpack body
in place: its large tensors are views into it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeAlias

import msgspec
from torch import Tensor

from flowroll.errors import ServerConnectionError
from flowroll.types import GeneratedImage, Rollout
from flowroll.types.tensors import plain_tensor, tensor_bytes
from flowroll.wire.body import EncodedBody, Segment
from flowroll.wire.dialects import image_from_wire, image_to_wire, rollout_from_wire, rollout_to_wire
from flowroll.wire.envelope import TOKEN_CHARS, json_envelope, msgpack_envelope
from flowroll.wire.messages import Data, Dialect, WireImage, WireSample
from flowroll.wire.safetensors import safetensors_prefix, tensor_from_blob

WireFormat: TypeAlias = Literal["json", "msgpack"]
Body: TypeAlias = bytes | bytearray | memoryview

JSON = "application/json"
MSGPACK = "application/msgpack"
# A prefix of whole base64 groups, 8-byte aligned: the data can be encoded on its own.
_PREFIX_MULTIPLE = 24


class Blob(msgspec.Struct, Generic[Data], frozen=True):
    """The envelope of a tensor. The safetensors header in it repeats dtype and shape, and takes precedence."""

    data: Data


# What an answer is decoded as: base64 into buffers of their own, raw bytes in place.
_ROLLOUTS: Mapping[str, Any] = {
    JSON: msgspec.json.Decoder(list[WireSample[Blob[bytearray]]]),
    MSGPACK: msgspec.msgpack.Decoder(list[WireSample[Blob[memoryview]]]),
}
_IMAGES: Mapping[str, Any] = {
    JSON: msgspec.json.Decoder(list[WireImage[Blob[bytearray]]]),
    MSGPACK: msgspec.msgpack.Decoder(list[WireImage[Blob[memoryview]]]),
}


def encode_rollouts(rollouts: Sequence[Rollout], *, wire_format: WireFormat, dialect: Dialect = "native") -> EncodedBody:
    """Encodes the answer of POST /rollout/generate.

    The body refers to the rollouts' tensors; do not write to them before it is sent.
    """
    return encode([rollout_to_wire(rollout, dialect) for rollout in rollouts], wire_format)


def encode_images(images: Sequence[GeneratedImage], *, wire_format: WireFormat) -> EncodedBody:
    """Encodes the answer of POST /generate; the body refers to the images' tensors."""
    return encode([image_to_wire(image) for image in images], wire_format)


def decode_rollouts(body: Body, content_type: str) -> list[Rollout]:
    """Decodes the rollouts of an answer of POST /rollout/generate, in either dialect.

    All tensors are writable and share no memory with each other. Pass a `bytearray` to get the large tensors of a msgpack
    answer without a copy: the tensors then use its memory, it must not be changed any more, and it lives as long as any of
    them.

    Args:
        body: The complete answer.
        content_type: The answer's media type.

    Raises:
        ServerConnectionError: The body is truncated, or is not such an answer.
    """
    with reading("rollouts"):
        return [rollout_from_wire(sample, load) for sample in _ROLLOUTS[media_type_of(content_type)].decode(body)]


def decode_images(body: Body, content_type: str) -> list[GeneratedImage]:
    """Decodes the images of an answer of POST /generate; for the tensors see `decode_rollouts`.

    Raises:
        ServerConnectionError: The body is truncated, or is not an answer of this route.
    """
    with reading("images"):
        return [image_from_wire(sample, load) for sample in _IMAGES[media_type_of(content_type)].decode(body)]


def encode(answer: object, wire_format: WireFormat) -> EncodedBody:
    """Encodes plain containers with tensors as leaves; the body refers to the tensors' storage."""
    # The placeholder is random, so that no prompt can contain it by accident or on purpose.
    token = secrets.token_hex(TOKEN_CHARS // 2)
    tensors: list[Tensor] = []

    def placeholder(value: object) -> str:
        assert isinstance(value, Tensor), f"{type(value).__name__} in an answer"
        tensors.append(value)
        return token

    dump: Callable[..., bytes] = msgspec.json.encode if wire_format == "json" else msgspec.msgpack.encode
    parts = dump(answer, enc_hook=placeholder).split(dump(token))
    assert len(parts) == len(tensors) + 1
    segments: list[Segment] = []
    offset, before = 0, parts[0]
    for tensor, part in zip(tensors, parts[1:], strict=True):
        source = plain_tensor(tensor)
        prefix = safetensors_prefix({"t": source}, multiple=_PREFIX_MULTIPLE)
        if wire_format == "json":
            head, tail = json_envelope(source, prefix)
        else:
            head, tail = msgpack_envelope(source, prefix, offset + len(before))
        segments.append(Segment(data=before + head))
        segments.append(Segment(data=tensor_bytes(source).toreadonly(), is_base64=wire_format == "json", owner=source))
        offset += segments[-2].length + segments[-1].length
        before = tail + part
    segments.append(Segment(data=before))
    return EncodedBody(content_type=JSON if wire_format == "json" else MSGPACK, segments=tuple(segments))


def load(leaf: Blob[Any]) -> Tensor:
    """Returns the tensor of a leaf."""
    return tensor_from_blob(leaf.data)


def media_type_of(content_type: str) -> str:
    """Returns the media type of an answer.

    Raises:
        ServerConnectionError: flowroll does not use the media type.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in (JSON, MSGPACK):
        raise ServerConnectionError(
            f"the answer must be {JSON} or {MSGPACK}, got {content_type[:80]!r}; check that the URL is a flowroll server's."
        )
    return media_type


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns every error about a malformed answer into a `ServerConnectionError`."""
    try:
        yield
    except (msgspec.DecodeError, ValueError, RecursionError, AssertionError) as error:
        raise ServerConnectionError(
            f"the answer must hold {what}, got {error}; check that client and server are of the same version, and retry."
        ) from error
