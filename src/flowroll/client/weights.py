"""The methods of both clients about weights, adapters and memory, as `calls` has the others."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import msgspec
from torch import Tensor

from flowroll.client import pushing
from flowroll.client.calls import CHANGE, UPDATE, UpdateMode
from flowroll.client.exchange import Call, Steps, excerpt, post, read_by
from flowroll.client.pushing import NamedTensors
from flowroll.errors import ServerConnectionError
from flowroll.types import AdapterChange, LoraAdapter, MemoryChange, ModuleName, WeightUpdate
from flowroll.wire.codec import WireFormat
from flowroll.wire.control import ReleaseRequest, ResumeRequest
from flowroll.wire.names import (
    ADAPTERS_ROUTE,
    CHECKSUM_ROUTE,
    LOAD_ADAPTER_ROUTE,
    RELEASE_ROUTE,
    RESUME_ROUTE,
    UNLOAD_ADAPTER_ROUTE,
    UPDATE_FROM_DISK_ROUTE,
    VERIFY_ROUTE,
)
from flowroll.wire.weights import (
    ChecksumRequest,
    LoadAdapterRequest,
    LoraAdaptersObject,
    UnloadAdapterRequest,
    Updatable,
    UpdateFromDiskRequest,
    VerifiedObject,
    VerifyRequest,
)

_ADAPTERS = msgspec.json.Decoder(LoraAdaptersObject)
_MEMORY = msgspec.json.Decoder(MemoryChange)
_SUMS = msgspec.json.Decoder(dict[str, str])
_VERIFIED = msgspec.json.Decoder(VerifiedObject)


def update_weights_from_disk(
    _: WireFormat,
    /,
    path: str | PathLike[str],
    *,
    module: Updatable = "transformer",
    weight_version: str | None = None,
    mode: UpdateMode = "drain",
) -> Call[WeightUpdate]:
    """Has the server take new weights from its disk: all of them, or, whatever goes wrong, none.

    Args:
        path: On the server's disk, absolute, inside a folder of its --weights-root: a checkpoint folder, the module's own,
            or one .safetensors file.
        module: "transformer" or "vae".
        weight_version: Of the new weights; None: the server counts.
        mode: As for `update_weights`.

    Raises:
        ForbiddenError: The server may not read there.
        WeightsRejectedError: Files that cannot be read to their end, or are not the module's. Everything is as it was.
        FlowrollError: As for `rollout`.
    """
    sent = UpdateFromDiskRequest(model_path=str(path), module=module, weight_version=weight_version, mode=mode)
    return post(UPDATE_FROM_DISK_ROUTE, sent, lambda body, _: read_by(UPDATE, body))


def update_weights(
    _: WireFormat,
    /,
    named_tensors: NamedTensors,
    *,
    module: Updatable = "transformer",
    weight_version: str | None = None,
    mode: UpdateMode = "drain",
    bucket_bytes: int = pushing.BUCKET_BYTES,
    partial: bool = False,
) -> Steps[WeightUpdate]:
    """Sends the server new weights over HTTP: it takes all of them, or, whatever goes wrong, none.

    They go in buckets, while the server goes on with its requests; its weights change at the end, between two requests.

    Args:
        named_tensors: By the names of the module's state_dict, e.g. `trainer.state_dict()`, or a generator of pairs; on any
            device. Only one bucket of them is held at a time, and none is copied as a whole. Of a trainer sharded by FSDP2
            (DTensors), every rank makes this call with `trainer.state_dict()`: all gather, the first rank of the mesh
            sends, and every rank gets the same answer or error.
        module: "transformer" or "vae".
        weight_version: Of the new weights; None: the server counts.
        mode: What becomes of the requests that run there: "drain": they finish first; "abort": they are done again, wholly,
            with the new weights.
        bucket_bytes: Size of a bucket; at most the server's --max-weights-body-bytes.
        partial: Whether what is not sent stays as it is; otherwise it is an error.

    Raises:
        InvalidRequestError: A tensor has no elements that could be read, or is of no float dtype; it is named.
        WeightsRejectedError: The tensors are not the module's. Everything is as it was.
        WeightsBusyError: Another update is under way.
        FlowrollError: As for `rollout`. After a `ServerConnectionError` at the end, `server_info` tells the version.
    """
    return pushing.push_weights(
        named_tensors,
        module=module,
        weight_version=weight_version,
        partial=partial,
        mode=mode,
        bucket_bytes=bucket_bytes,
    )


def weights_checksum(_: WireFormat, /, module: ModuleName = "transformer") -> Call[str]:
    """sha256 over the server's weights; `flowroll.replay.weights_checksum` is the same for a trainer's module.

    Args:
        module: "transformer", "text_encoder" or "vae".
    """
    return post(CHECKSUM_ROUTE, ChecksumRequest(module_names=[module]), lambda body, _: _read_sum(body, module))


def verify_weights(_: WireFormat, /, expected: Mapping[str, str], *, module: ModuleName = "transformer") -> Call[int]:
    """Has the server compare its weights with the trainer's, tensor by tensor.

    Args:
        expected: sha256 of every tensor by its name, as `flowroll.replay.tensor_checksums` makes them.
        module: "transformer", "text_encoder" or "vae".

    Returns:
        How many tensors were compared.

    Raises:
        WeightsMismatchError: It names those that differ, are missing or unknown.
    """
    sent = VerifyRequest(module=module, expected=dict(expected))
    return post(VERIFY_ROUTE, sent, lambda body, _: read_by(_VERIFIED, body).num_tensors)


def load_lora_adapter(
    _: WireFormat,
    /,
    path: str | PathLike[str],
    *,
    name: str,
    merged: bool = False,
    weight_version: str | None = None,
    mode: UpdateMode = "drain",
) -> Call[AdapterChange]:
    """Has the server load a LoRA adapter, or replace the one of that name; requests choose it by `lora_name`.

    Args:
        path: On the server's disk, absolute, inside a folder of its --weights-root: what peft's `save_pretrained` wrote.
        name: Printable text of 1 to 128 characters.
        merged: Add it to a copy of the weights that it changes, instead of running it beside them.
        weight_version: Of the server's weights from now on; None: the server counts.
        mode: As for `update_weights`.

    Raises:
        ForbiddenError: The server may not read there.
        WeightsRejectedError: No plain LoRA adapter of the server's model, or there is no room. Everything is as it was.
        FlowrollError: As for `rollout`.
    """
    sent = LoadAdapterRequest(lora_name=name, lora_path=str(path), merged=merged, weight_version=weight_version, mode=mode)
    return post(LOAD_ADAPTER_ROUTE, sent, lambda body, _: read_by(CHANGE, body))


def load_lora_adapter_from_tensors(
    _: WireFormat,
    /,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    name: str,
    merged: bool = False,
    weight_version: str | None = None,
    mode: UpdateMode = "drain",
) -> Steps[AdapterChange]:
    """Sends the server a LoRA adapter; see `load_lora_adapter`.

    Args:
        tensors: `peft.get_peft_model_state_dict(model)`; sharded ones as for `update_weights`.
        config: `model.peft_config["default"].to_dict()`.
        name: See `load_lora_adapter`, as for the rest.
        merged: The same.
        weight_version: The same.
        mode: The same.
    """
    return pushing.push_adapter(tensors, config, name, merged, weight_version, mode)


def unload_lora_adapter(
    _: WireFormat, /, name: str, *, weight_version: str | None = None, mode: UpdateMode = "drain"
) -> Call[AdapterChange]:
    """Has the server forget an adapter.

    Args:
        name: Of the adapter.
        weight_version: Of the server's weights from now on; None: the server counts.
        mode: As for `update_weights`.
    """
    sent = UnloadAdapterRequest(lora_name=name, weight_version=weight_version, mode=mode)
    return post(UNLOAD_ADAPTER_ROUTE, sent, lambda body, _: read_by(CHANGE, body))


def lora_adapters(_: WireFormat, /) -> Call[list[LoraAdapter]]:
    """The server's adapters, in the order of loading."""
    return Call(method="GET", path=ADAPTERS_ROUTE, read=lambda body, _: read_by(_ADAPTERS, body).adapters)


def release_memory(_: WireFormat, /, mode: Literal["offload", "disk"] = "offload") -> Call[MemoryChange]:
    """Has the server release the memory of its weights, once the requests that run have finished.

    Args:
        mode: "offload": to pinned memory of the host; "disk": to a file without a name.

    Raises:
        FlowrollError: As for `rollout`.
    """
    return post(RELEASE_ROUTE, ReleaseRequest(mode=mode), lambda body, _: read_by(_MEMORY, body))


def resume_memory(_: WireFormat, /) -> Call[MemoryChange]:
    """Has the server take the memory of its weights again; they are as they were."""
    return post(RESUME_ROUTE, ResumeRequest(), lambda body, _: read_by(_MEMORY, body))


def _read_sum(body: bytearray, module: str) -> str:
    digest = read_by(_SUMS, body).get(module)
    if digest is None:
        raise ServerConnectionError(f"the answer must hold the sum of {module}, got {excerpt(body)}; check the URL.")
    return digest
