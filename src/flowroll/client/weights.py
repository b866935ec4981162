"""The methods of both clients about weights, adapters and memory; the others are in `calls`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import msgspec
from torch import Tensor

from flowroll.client.calls import CHANGE, UPDATE, UpdateMode
from flowroll.client.exchange import Call, Steps, excerpt, post, reader
from flowroll.client.pushing import (
    BUCKET_BYTES,
    NamedTensors,
    abandon_call,
    adapter_call,
    begin_call,
    bucket_call,
    commit_call,
    gathered_buckets,
)
from flowroll.client.ranks import TrainerRanks
from flowroll.errors import FlowrollError, InvalidRequestError, ServerConnectionError
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

_ADAPTERS = reader(msgspec.json.Decoder(LoraAdaptersObject))
_MEMORY = reader(msgspec.json.Decoder(MemoryChange))
_SUMS = reader(msgspec.json.Decoder(dict[str, str]))
_VERIFIED = reader(msgspec.json.Decoder(VerifiedObject))


def update_weights_from_disk(
    _: WireFormat,
    /,
    path: str | PathLike[str],
    *,
    module: Updatable = "transformer",
    weight_version: str | None = None,
    mode: UpdateMode = "drain",
) -> Call[WeightUpdate]:
    """Has the server load new weights from its disk: either all of them or, if anything fails, none.

    Args:
        path: An absolute path on the server's disk, inside a folder of its --weights-root: a checkpoint folder, the module's
            own folder, or one .safetensors file.
        module: The module to update: "transformer" or "vae".
        weight_version: The version of the new weights; None: the server increments its own.
        mode: What happens to the requests that run; see `update_weights`.

    Raises:
        ForbiddenError: The server may not read that path.
        WeightsRejectedError: The files cannot be read to their end, or are not those of the module. Nothing has changed.
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    sent = UpdateFromDiskRequest(model_path=str(path), module=module, weight_version=weight_version, mode=mode)
    return post(UPDATE_FROM_DISK_ROUTE, sent, UPDATE)


def update_weights(
    _: WireFormat,
    /,
    named_tensors: NamedTensors,
    *,
    module: Updatable = "transformer",
    weight_version: str | None = None,
    mode: UpdateMode = "drain",
    bucket_bytes: int = BUCKET_BYTES,
    partial: bool = False,
) -> Steps[WeightUpdate]:
    """Sends the server new weights over HTTP, of which it takes all or, if anything fails, none.

    The weights are sent in buckets while the server runs its requests; they change at the end, between two requests.

    Args:
        named_tensors: The tensors, on any device, by their names in the module's state_dict, e.g. `trainer.state_dict()`, or a
            generator of pairs. Only one bucket is held at a time, and the module is never copied as a whole. If FSDP2 shards
            the trainer (DTensors), every rank makes this call with `trainer.state_dict()`: all ranks gather, the first rank of
            the mesh sends, and every rank gets the same answer or error.
        module: The module to update: "transformer" or "vae".
        weight_version: The version of the new weights; None: the server increments its own.
        mode: What happens to the requests that run there. "drain": they finish first; "abort": they are run again from the
            start with the new weights.
        bucket_bytes: The size of a bucket in bytes, at most the server's --max-weights-body-bytes.
        partial: Whether tensors that are not sent stay as they are; otherwise a missing tensor is an error.

    Raises:
        InvalidRequestError: A tensor has no readable elements, or no float dtype; the message names it.
        WeightsRejectedError: The tensors are not those of the module. Nothing has changed.
        WeightsBusyError: Another update is under way.
        FlowrollError: The call fails for a reason that `rollout` lists. After a `ServerConnectionError` at the end,
            `server_info` tells the version.
    """
    ranks, buckets = gathered_buckets(named_tensors, bucket_bytes)
    update_id: str = yield from ranks.once(lambda: begin_call(module, weight_version, partial), str)
    try:
        for bucket in buckets:
            yield from ranks.once(functools.partial(bucket_call, update_id, bucket), None)
        return (yield from ranks.once(lambda: commit_call(update_id, mode), WeightUpdate))
    except GeneratorExit:
        raise
    except BaseException:
        # Or the next update waits for this one.
        if ranks.sends:
            with contextlib.suppress(FlowrollError):
                yield abandon_call(update_id)
        raise


def weights_checksum(_: WireFormat, /, module: ModuleName = "transformer") -> Call[str]:
    """Returns the sha256 over the server's weights; `flowroll.replay.weights_checksum` computes it for a trainer's module.

    Args:
        module: The module to read: "transformer", "text_encoder" or "vae".
    """
    return post(CHECKSUM_ROUTE, ChecksumRequest(module_names=[module]), lambda body, _: _read_sum(body, module))


def verify_weights(_: WireFormat, /, expected: Mapping[str, str], *, module: ModuleName = "transformer") -> Call[int]:
    """Has the server compare its weights with the trainer's, tensor by tensor.

    Args:
        expected: The sha256 of every tensor by its name, as `flowroll.replay.tensor_checksums` computes them.
        module: The module to read: "transformer", "text_encoder" or "vae".

    Returns:
        The number of tensors that were compared.

    Raises:
        WeightsMismatchError: The weights differ; the message names the tensors that differ, are missing or are unknown.
    """
    sent = VerifyRequest(module=module, expected=dict(expected))
    return post(VERIFY_ROUTE, sent, lambda *answer: _VERIFIED(*answer).num_tensors)


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
    """Has the server load a LoRA adapter, or replace the adapter of that name; requests choose it by `lora_name`.

    Args:
        path: An absolute path on the server's disk, inside a folder of its --weights-root: the folder that peft's
            `save_pretrained` wrote.
        name: The adapter's name, printable text of 1 to 128 characters.
        merged: Whether the adapter is added to a copy of the weights that it changes, instead of running beside them.
        weight_version: The version of the server's weights from now on; None: the server increments its own.
        mode: What happens to the requests that run; see `update_weights`.

    Raises:
        ForbiddenError: The server may not read that path.
        WeightsRejectedError: The files are not a plain LoRA adapter for the server's model, or there is no room. Nothing has
            changed.
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    sent = LoadAdapterRequest(lora_name=name, lora_path=str(path), merged=merged, weight_version=weight_version, mode=mode)
    return post(LOAD_ADAPTER_ROUTE, sent, CHANGE)


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
        tensors: The result of `peft.get_peft_model_state_dict(model)`; sharded tensors are gathered as in `update_weights`.
        config: The adapter's configuration, `model.peft_config["default"].to_dict()`.
        name: The adapter's name, printable text of 1 to 128 characters.
        merged: Whether the adapter is added to a copy of the weights that it changes, instead of running beside them.
        weight_version: The version of the server's weights from now on; None: the server increments its own.
        mode: What happens to the requests that run; see `update_weights`.
    """
    if not isinstance(tensors, Mapping):
        raise InvalidRequestError(
            f"tensors must be a mapping of names to tensors, got {type(tensors).__name__}; use get_peft_model_state_dict."
        )
    ranks = TrainerRanks(tensors.values())
    whole = ranks.gather(tensors)
    make = functools.partial(adapter_call, whole, config, name, merged, weight_version, mode)
    return (yield from ranks.once(make, AdapterChange))


def unload_lora_adapter(
    _: WireFormat, /, name: str, *, weight_version: str | None = None, mode: UpdateMode = "drain"
) -> Call[AdapterChange]:
    """Has the server unload an adapter.

    Args:
        name: The adapter's name.
        weight_version: The version of the server's weights from now on; None: the server increments its own.
        mode: What happens to the requests that run; see `update_weights`.
    """
    sent = UnloadAdapterRequest(lora_name=name, weight_version=weight_version, mode=mode)
    return post(UNLOAD_ADAPTER_ROUTE, sent, CHANGE)


def lora_adapters(_: WireFormat, /) -> Call[list[LoraAdapter]]:
    """Returns the server's adapters in the order of loading."""
    return Call(method="GET", path=ADAPTERS_ROUTE, read=lambda *answer: _ADAPTERS(*answer).adapters)


def release_memory(_: WireFormat, /, mode: Literal["offload", "disk", "discard"] = "offload") -> Call[MemoryChange]:
    """Has the server release the memory of its weights, once the requests that run have finished.

    Args:
        mode: Where the weights go. "offload": to pinned memory of the host; "disk": to a file without a name.
            "discard": the transformer's are not kept; after `resume_memory`, send a complete update.

    Raises:
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    return post(RELEASE_ROUTE, ReleaseRequest(mode=mode), _MEMORY)


def resume_memory(_: WireFormat, /) -> Call[MemoryChange]:
    """Has the server allocate the memory of its weights again and restore them unchanged, but for those that it discarded."""
    return post(RESUME_ROUTE, ResumeRequest(), _MEMORY)


def _read_sum(body: bytearray, module: str) -> str:
    digest = _SUMS(body, "").get(module)
    if digest is None:
        raise ServerConnectionError(f"the answer must hold the sum of {module}, got {excerpt(body)}; check the URL.")
    return digest
