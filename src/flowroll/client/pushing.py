"""A trainer's tensors as buckets of an update; see `Client.update_weights`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import urlencode

from torch import Tensor

from flowroll.client.calls import CHANGE, UPDATE, UpdateMode
from flowroll.client.exchange import Call, post, read_by, read_object
from flowroll.errors import InvalidRequestError
from flowroll.types import AdapterChange, WeightUpdate, adapter_config_text
from flowroll.wire.blob import data_view, plain, safetensors_prefix
from flowroll.wire.body import EncodedBody, Segment
from flowroll.wire.names import ABANDON_ROUTE, ADAPTER_FROM_TENSORS_ROUTE, BEGIN_ROUTE, BUCKETS_ROUTE, COMMIT_ROUTE

NamedTensors: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

BUCKET_BYTES = 512 * 2**20
_OCTETS = "application/octet-stream"


def begin_call(module: str, weight_version: str | None, partial: bool) -> Call[str]:
    """POST /weights/begin: the id of the update."""
    sent = {"module": module, "weight_version": weight_version, "partial": partial}
    return post(BEGIN_ROUTE, sent, lambda body, content_type: str(read_object(body, content_type).get("update_id")))


def bucket_call(update_id: str, bucket: Mapping[str, Tensor]) -> Call[dict[str, object]]:
    """POST /weights/{update_id}/buckets. The data is sent from where it lies.

    Raises:
        InvalidRequestError: A tensor of a dtype that cannot be sent.
    """
    tensors = {name: plain(tensor) for name, tensor in bucket.items()}
    try:
        prefix = safetensors_prefix(tensors)
    except KeyError as error:
        raise InvalidRequestError(f"named_tensors must be of a float dtype, got {error}; convert them.") from error
    data = [Segment(data=data_view(tensor), owner=tensor) for tensor in tensors.values()]
    content = EncodedBody(content_type=_OCTETS, segments=(Segment(data=prefix), *data))
    path = BUCKETS_ROUTE.format(update_id=update_id)
    return Call(method="POST", path=path, read=read_object, content=content, content_type=_OCTETS)


def adapter_call(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    name: str,
    merged: bool,
    weight_version: str | None,
    mode: UpdateMode,
) -> Call[AdapterChange]:
    """POST /load_lora_adapter_from_tensors. The data is sent from where it lies.

    Raises:
        InvalidRequestError: A tensor of a dtype that cannot be sent, or a configuration that is none.
    """
    try:
        sent = {key: plain(tensor) for key, tensor in tensors.items()}
        prefix = safetensors_prefix(sent, metadata={"adapter_config": adapter_config_text(config)})
    except (KeyError, TypeError) as error:
        raise InvalidRequestError(f"tensors and config must be peft's, got {error}; use get_peft_model_state_dict.") from error
    data = [Segment(data=data_view(tensor), owner=tensor) for tensor in sent.values()]
    content = EncodedBody(content_type=_OCTETS, segments=(Segment(data=prefix), *data))
    version = {} if weight_version is None else {"weight_version": weight_version}
    query = {"lora_name": name, "merged": str(merged).lower(), "mode": mode, **version}
    path = f"{ADAPTER_FROM_TENSORS_ROUTE}?{urlencode(query)}"
    return Call(method="POST", path=path, read=lambda body, _: read_by(CHANGE, body), content=content, content_type=_OCTETS)


def commit_call(update_id: str, mode: UpdateMode) -> Call[WeightUpdate]:
    """POST /weights/{update_id}/commit."""
    return post(COMMIT_ROUTE.format(update_id=update_id), {"mode": mode}, lambda body, _: read_by(UPDATE, body))


def abandon_call(update_id: str) -> Call[dict[str, object]]:
    """POST /weights/{update_id}/abort."""
    return Call(method="POST", path=ABANDON_ROUTE.format(update_id=update_id), read=read_object)


def buckets_of(named_tensors: NamedTensors, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, in lots of at most `bucket_bytes`, or of one that is larger; taken when their turn comes.

    Raises:
        InvalidRequestError: A name comes twice in a lot, or the size is none.
    """
    if bucket_bytes < 1:
        raise InvalidRequestError(f"bucket_bytes must be at least 1, got {bucket_bytes}; leave it out.", field="bucket_bytes")
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
        if name in bucket:
            raise InvalidRequestError(f"named_tensors must have each name once, got {name} twice; drop one of them.")
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += nbytes
    if bucket:
        yield bucket
