"""The calls that send a trainer's tensors to a server as the buckets of an update; see `Client.update_weights`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import urlencode

import msgspec
import torch
from torch import Tensor

from flowroll.client.calls import CHANGE, UPDATE, UpdateMode
from flowroll.client.exchange import Call, post, read_object
from flowroll.client.ranks import TrainerRanks
from flowroll.errors import InvalidRequestError
from flowroll.types import AdapterChange, WeightUpdate, adapter_config_text
from flowroll.types.tensors import readable_bytes, tensor_bytes
from flowroll.wire.body import EncodedBody, Segment
from flowroll.wire.names import ABANDON_ROUTE, ADAPTER_FROM_TENSORS_ROUTE, BEGIN_ROUTE, BUCKETS_ROUTE, COMMIT_ROUTE
from flowroll.wire.safetensors import safetensors_prefix
from flowroll.wire.weight_updates import BeginUpdateRequest, CommitUpdateRequest
from flowroll.wire.weights import AdapterFromTensorsRequest, Updatable

NamedTensors: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

BUCKET_BYTES = 512 * 2**20
_OCTETS = "application/octet-stream"


def begin_call(module: Updatable, weight_version: str | None, partial: bool) -> Call[str]:
    """Makes the call POST /weights/begin, which returns the id of the update."""
    sent = BeginUpdateRequest(module=module, weight_version=weight_version, partial=partial)
    return post(BEGIN_ROUTE, sent, lambda body, content_type: str(read_object(body, content_type).get("update_id")))


def bucket_call(update_id: str, bucket: Mapping[str, Tensor]) -> Call[dict[str, object]]:
    """Makes the call POST /weights/{update_id}/buckets for ordinary tensors, whose data is sent without a copy.

    Raises:
        InvalidRequestError: A tensor has a dtype that cannot be sent.
    """
    try:
        prefix = safetensors_prefix(bucket)
    except KeyError as error:
        raise InvalidRequestError(f"named_tensors must be of a float dtype, got {error}; convert them.") from error
    path = BUCKETS_ROUTE.format(update_id=update_id)
    return Call(method="POST", path=path, read=read_object, content=_body(prefix, bucket), content_type=_OCTETS)


def adapter_call(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    name: str,
    merged: bool,
    weight_version: str | None,
    mode: UpdateMode,
) -> Call[AdapterChange]:
    """Makes the call POST /load_lora_adapter_from_tensors for ordinary tensors, whose data is sent without a copy.

    Raises:
        InvalidRequestError: A tensor has a dtype that cannot be sent, or the configuration is not one of peft.
    """
    try:
        prefix = safetensors_prefix(tensors, metadata={"adapter_config": adapter_config_text(config)})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"tensors and config must be peft's, got {error}; use get_peft_model_state_dict.") from error
    query = AdapterFromTensorsRequest(
        lora_name=name, merged="true" if merged else "false", weight_version=weight_version, mode=mode
    )
    path = f"{ADAPTER_FROM_TENSORS_ROUTE}?{urlencode(msgspec.to_builtins(query))}"
    content = _body(prefix, tensors)
    return Call(method="POST", path=path, read=CHANGE, content=content, content_type=_OCTETS)


def _body(prefix: bytes, tensors: Mapping[str, Tensor]) -> EncodedBody:
    data = [Segment(data=tensor_bytes(tensor).toreadonly(), owner=tensor) for tensor in tensors.values()]
    return EncodedBody(content_type=_OCTETS, segments=(Segment(data=prefix), *data))


def commit_call(update_id: str, mode: UpdateMode) -> Call[WeightUpdate]:
    """Makes the call POST /weights/{update_id}/commit."""
    return post(COMMIT_ROUTE.format(update_id=update_id), CommitUpdateRequest(mode=mode), UPDATE)


def abandon_call(update_id: str) -> Call[dict[str, object]]:
    """Makes the call POST /weights/{update_id}/abort."""
    return Call(method="POST", path=ABANDON_ROUTE.format(update_id=update_id), read=read_object)


def gathered_buckets(
    named_tensors: NamedTensors, bucket_bytes: int, device: torch.device | str = "cpu"
) -> tuple[TrainerRanks, Iterator[dict[str, Tensor]]]:
    """Returns the ranks that push these tensors, and the gathered buckets, which are empty on ranks that do not send.

    The first bucket is gathered at once, so that what cannot be sent is refused before a server begins. If the tensors come
    from a generator, the first bucket alone shows how they are sharded.
    """
    buckets = buckets_of(named_tensors, bucket_bytes)
    first = next(buckets, {})
    ranks = TrainerRanks((named_tensors if isinstance(named_tensors, Mapping) else first).values())
    gathered = [ranks.gather(first, device)] if first else []
    return ranks, itertools.chain(gathered, (ranks.gather(bucket, device) for bucket in buckets))


def buckets_of(named_tensors: NamedTensors, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors in order, in buckets of at most `bucket_bytes` bytes; a larger tensor gets a bucket of its own.

    Raises:
        InvalidRequestError: A name occurs twice in a bucket, an entry is not a tensor with data, or `bucket_bytes` is below 1.
    """
    if bucket_bytes < 1:
        raise InvalidRequestError(f"bucket_bytes must be at least 1, got {bucket_bytes}; leave it out.", field="bucket_bytes")
    bucket: dict[str, Tensor] = {}
    size = 0
    for pair in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InvalidRequestError(
                f"named_tensors must be pairs of a name and a tensor, got a {type(pair).__name__}; give model.state_dict()."
            )
        name, tensor = pair
        if name in bucket:
            raise InvalidRequestError(f"named_tensors must have each name once, got {name} twice; drop one of them.")
        nbytes = readable_bytes(tensor, name)
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += nbytes
    if bucket:
        yield bucket
