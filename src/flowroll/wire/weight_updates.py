"""The requests about new weights that arrive in buckets, over HTTP or by shared memory, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from flowroll.errors import InvalidRequestError
from flowroll.types import ModuleName
from flowroll.wire import fields
from flowroll.wire.fields import Request, about
from flowroll.wire.validation import shown
from flowroll.wire.weights import Changing, Targeted, Updatable, Versioned

_Module: TypeAlias = Annotated[Updatable, about("transformer", "leave it out for the transformer")]


class BeginUpdateRequest(Versioned, kw_only=True, frozen=True):
    """Body of POST /weights/begin; it may be left out.

    Attributes:
        module: What to update.
        partial: Whether tensors that do not arrive stay as they are; otherwise they are an error at the commit.
    """

    EXAMPLES = ({"module": "transformer", "weight_version": "120"},)

    module: _Module = "transformer"
    partial: Annotated[bool, about(False, "leave it out to send the whole module")] = False


class CommitUpdateRequest(Request, kw_only=True, frozen=True):
    """Body of POST /weights/{update_id}/commit; it may be left out.

    Attributes:
        mode: What becomes of the requests that run: they finish first, or are done again, wholly, with the new weights.
    """

    EXAMPLES = ({"mode": "abort"},)

    mode: fields.Mode = "drain"


class BodyUpdateRequest(Changing, kw_only=True, frozen=True):
    """Query of POST /update_weights_from_safetensors.

    Attributes:
        module: What to update.
    """

    module: _Module = "transformer"


class Bucketed(Targeted, kw_only=True, frozen=True):
    """What the requests have in common that bring one bucket of new weights.

    Attributes:
        update_id: The id of an update from POST /weights/begin, which the bucket is added to; nothing changes before its
            commit. null: the bucket is put in place at once.
    """

    update_id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=64)] | None,
        about(None, "leave it out to have the bucket put in place at once"),
    ] = None

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses beside an update's id what its begin or commit says."""
        super().check(sent)
        for name in ("weight_version", "mode"):
            if self.update_id is not None and name in sent:
                raise InvalidRequestError(
                    f"{name} must not be given beside update_id, got {getattr(self, name)}; it belongs to the update's begin "
                    "or commit.",
                    field=name,
                )


class UpdateFromTensorRequest(Bucketed, kw_only=True, frozen=True):
    """Body of POST /update_weights_from_tensor.

    Attributes:
        serialized_named_tensors: Pickled tensors as base64, an entry for each of the trainer's ranks, all of which hold the
            whole bucket. One is read: the first, or that of the server's GPU. The pickle holds {"transformer": bucket} or
            {"transformer": [(name, tensor), ...]}, or the bucket or the list alone.
        payload_gpu_uuids: The GPU that each entry comes from: a server on a GPU reads the entry of its own.
        load_format: What is pickled; null: (name, tensor) pairs.
        weight_update_mode: "lora_merge": the tensors are `<layer>.lora_A` and `<layer>.lora_B` of an adapter with which every
            request runs that names none. null: they are weights.
        lora_alpha: Alpha of the adapter. null: each layer's rank.
        lora_rank: Rank of the adapter. The one of the tensors counts.
    """

    EXAMPLES = (
        {
            "serialized_named_tensors": ["gASV..."],
            "load_format": "flattened_bucket",
            "target_modules": ["transformer"],
            "weight_version": "120",
        },
    )

    serialized_named_tensors: Annotated[
        Annotated[list[str], Meta(min_length=1)],
        about(["gASV..."], "send what MultiprocessingSerializer makes", "be a list of at least one string"),
    ]
    payload_gpu_uuids: Annotated[
        list[Annotated[str, Meta(max_length=128)]] | None,
        about(
            ["GPU-8d3f6a52-0c1e-4b7a-9f2d-1a2b3c4d5e6f"],
            "leave it out to have the first entry read",
            "be null or a list of UUIDs",
        ),
    ] = None
    load_format: Annotated[Literal["flattened_bucket"] | None, about("flattened_bucket", "leave it out for named tensors")] = (
        None
    )
    weight_update_mode: Annotated[Literal["lora_merge"] | None, about("lora_merge", "leave it out for weights")] = None
    lora_alpha: Annotated[
        Annotated[float, Meta(gt=0)] | None, about(64, "leave it out for a scale of 1", "be null or a number above 0")
    ] = None
    lora_rank: Annotated[fields.Count | None, about(32, "leave it out", "be null or an integer above 0")] = None

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses UUIDs that are not one an entry, and fields of an adapter beside weights, or the other way round."""
        super().check(sent)
        uuids, count = self.payload_gpu_uuids, len(self.serialized_named_tensors)
        if uuids is not None and len(uuids) != count:
            raise InvalidRequestError(
                f"payload_gpu_uuids must have one entry for each of serialized_named_tensors, got {len(uuids)} for {count}; "
                "send all, or leave it out.",
                field="payload_gpu_uuids",
            )
        if self.weight_update_mode is None:
            for name in ("lora_alpha", "lora_rank"):
                if getattr(self, name) is not None:
                    raise InvalidRequestError(
                        f"{name} must be null for weights, got {shown(getattr(self, name))}; send weight_update_mode "
                        '"lora_merge" with it, or leave it out.',
                        field=name,
                    )
        elif self.chosen_module != "transformer" or self.update_id is not None:
            wrong = "target_modules" if self.chosen_module != "transformer" else "update_id"
            raise InvalidRequestError(
                f'{wrong} must fit weight_update_mode "lora_merge", which is for the transformer and at once, got '
                f"{self.chosen_module if wrong == 'target_modules' else self.update_id}; leave {wrong} out.",
                field=wrong,
            )


class CheckUpdateRequest(Request, kw_only=True, frozen=True):
    """Body of POST /update_weights_from_tensor_checker.

    Attributes:
        target_module: Part of the checkpoint.
        expected_named_tensors_sha256: By the name of a tensor, sha256 over its dtype, its shape and its bytes, as hexadecimal
            digits: of `str(dtype)`, `repr(tuple(shape))` and the data in memory. Tensors that are not named are not looked at.
    """

    EXAMPLES = ({"target_module": "transformer", "expected_named_tensors_sha256": {"proj_out.weight": "9f86d08..."}},)

    target_module: fields.Module
    expected_named_tensors_sha256: Annotated[
        Annotated[dict[str, str], Meta(min_length=1)],
        about(
            {"proj_out.weight": "9f86d08..."},
            "send the sha256 of the tensors by their names",
            "be an object of strings, of at least one",
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedUpdateObject:
    """Whether tensors are as expected.

    Attributes:
        success: Whether they are.
        message: The same in words; names what differs or is missing.
    """

    success: bool
    message: Annotated[str, Meta(examples=["Verified module 'transformer' update for 73 tensor(s)."])]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedUpdateObject:
    """A bucket is in place, or was added to the update that it names.

    Attributes:
        success: Always.
        message: The same in words.
        module: What is changed.
        is_complete: Whether the push is complete, so that samples start. Otherwise none starts before the rest has come.
        weight_version: The version from now on.
        num_arrived: Tensors that have come since the push began; layers of an adapter.
        num_tensors: Tensors that belong to it: those of the module, or the adapter's layers.
        verified: Whether the bytes that arrived were compared with a digest that the sender gave.
    """

    success: Literal[True] = True
    message: Annotated[str, Meta(examples=["40 tensors of transformer are in place"])]
    module: ModuleName
    is_complete: bool
    weight_version: str
    num_arrived: int
    num_tensors: int
    verified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneObject:
    """It is done.

    Attributes:
        success: Always.
        message: What is done.
    """

    success: Literal[True] = True
    message: Annotated[str, Meta(examples=["trainer-0 is destroyed"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunObject:
    """An update of which the server waits for the tensors.

    Attributes:
        update_id: Names it in the other calls.
        module: What is to change.
        num_tensors: Tensors of the module.
        num_bytes: The bytes of these tensors, in the dtype of the engine.
        max_body_bytes: Size of a bucket.
        idle_s: Seconds of silence after which the update is dropped.
    """

    update_id: str
    module: ModuleName
    num_tensors: int
    num_bytes: int
    max_body_bytes: int
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedObject:
    """What has arrived of an update. The weights are as they were.

    Attributes:
        update_id: The id of the update.
        module: What is to change.
        num_arrived: Tensors that have arrived so far.
        num_tensors: Tensors of the module.
    """

    update_id: str
    module: ModuleName
    num_arrived: int
    num_tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonedObject:
    """The update was dropped. The weights are as they were.

    Attributes:
        update_id: The id of the update.
    """

    update_id: str
