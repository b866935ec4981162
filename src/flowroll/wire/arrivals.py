"""The requests about new weights that arrive in buckets, and their answers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flowroll.errors import InvalidRequestError
from flowroll.types import ModuleName
from flowroll.wire.fields import Items, Rule
from flowroll.wire.schema import Strict
from flowroll.wire.weights import MODULES, Mode, Targeted, Updatable, Version, first_wrong

_Module: TypeAlias = Annotated[
    Updatable,
    Field(description="What to update.", examples=["transformer"]),
    Rule(text='be "transformer" or "vae"', remedy="leave it out for the transformer"),
]


class BeginUpdateRequest(Strict):
    """Body of POST /weights/begin."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"module": "transformer", "weight_version": "120"}]})

    module: _Module = "transformer"
    weight_version: Version = None
    partial: Annotated[
        bool,
        Field(description="Whether tensors that do not arrive stay as they are; otherwise they are an error at the commit."),
        Rule(text="be true or false", remedy="leave it out to send the whole module"),
    ] = False


class CommitUpdateRequest(Strict):
    """Body of POST /weights/{update_id}/commit; it may be left out."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"mode": "abort"}]})

    mode: Mode = "drain"


class BodyUpdateRequest(Strict):
    """Query of POST /update_weights_from_safetensors."""

    module: _Module = "transformer"
    weight_version: Version = None
    mode: Mode = "drain"


class Bucketed(Targeted):
    """What the requests have in common that bring one bucket of new weights."""

    update_id: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=64,
            description="Of an update from POST /weights/begin, which the bucket is added to; nothing changes before its "
            "commit. null: the bucket is put in place at once.",
            examples=[None],
        ),
        Rule(text="be null or a string of 1 to 64 characters", remedy="leave it out to have the bucket put in place at once"),
    ] = None

    @model_validator(mode="after")
    def _check_update(self) -> Bucketed:
        if self.update_id is not None:
            for name in ("weight_version", "mode"):
                if name in self.model_fields_set:
                    raise InvalidRequestError(
                        f"{name} must not be given beside update_id, got {getattr(self, name)}; it belongs to the update's "
                        "begin or commit.",
                        field=name,
                    )
        return self


class UpdateFromTensorRequest(Bucketed):
    """Body of POST /update_weights_from_tensor."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "serialized_named_tensors": ["gASV..."],
                    "load_format": "flattened_bucket",
                    "target_modules": ["transformer"],
                    "weight_version": "120",
                }
            ]
        }
    )

    serialized_named_tensors: Annotated[
        Items[str],
        Field(
            min_length=1,
            description="Pickled tensors as base64, an entry for each of the trainer's ranks, all of which hold the whole "
            "bucket. One is read: the first, or that of the server's GPU. The pickle holds "
            '{"transformer": bucket} or {"transformer": [(name, tensor), ...]}, or the bucket or the list alone.',
            examples=[["gASV..."]],
        ),
        Rule(text="be a list of at least one string", remedy="send what MultiprocessingSerializer makes"),
    ]
    payload_gpu_uuids: Annotated[
        Items[Annotated[str, Field(max_length=128)]] | None,
        Field(
            description="The GPU that each entry comes from: a server on a GPU reads the entry of its own.",
            examples=[["GPU-8d3f6a52-0c1e-4b7a-9f2d-1a2b3c4d5e6f"]],
        ),
        Rule(text="be null or a list of UUIDs", remedy="leave it out to have the first entry read"),
    ] = None
    load_format: Annotated[
        Literal["flattened_bucket"] | None,
        Field(description="What is pickled; null: (name, tensor) pairs.", examples=["flattened_bucket"]),
        Rule(text='be null or "flattened_bucket"', remedy="leave it out for named tensors"),
    ] = None
    weight_update_mode: Annotated[
        Literal["lora_merge"] | None,
        Field(
            description='"lora_merge": the tensors are `<layer>.lora_A` and `<layer>.lora_B` of an adapter with which every '
            "request runs that names none. null: they are weights.",
            examples=["lora_merge"],
        ),
        Rule(text='be null or "lora_merge"', remedy="leave it out for weights"),
    ] = None
    lora_alpha: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="Alpha of the adapter. null: each layer's rank.", examples=[64]),
        Rule(text="be null or a number above 0", remedy="leave it out for a scale of 1"),
    ] = None
    lora_rank: Annotated[
        int | None,
        Field(ge=1, description="Rank of the adapter. The one of the tensors counts.", examples=[32]),
        Rule(text="be null or an integer above 0", remedy="leave it out"),
    ] = None

    @model_validator(mode="after")
    def _check_beside(self) -> UpdateFromTensorRequest:
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
                        f"{name} must be null for weights, got {getattr(self, name)}; send weight_update_mode "
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
        return self


class CheckUpdateRequest(Strict):
    """Body of POST /update_weights_from_tensor_checker."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"target_module": "transformer", "expected_named_tensors_sha256": {"proj_out.weight": "9f86d08..."}}]
        }
    )

    target_module: Annotated[
        ModuleName,
        Field(description="Part of the checkpoint.", examples=["transformer"]),
        Rule(text=f"be {MODULES}", remedy="choose one of these"),
    ]
    expected_named_tensors_sha256: Annotated[
        dict[str, str],
        BeforeValidator(first_wrong),
        Field(
            min_length=1,
            description="By the name of a tensor, sha256 over its dtype, its shape and its bytes, as hexadecimal digits: of "
            "`str(dtype)`, `repr(tuple(shape))` and the data in memory. Tensors that are not named are not looked at.",
            examples=[{"proj_out.weight": "9f86d08..."}],
        ),
        Rule(text="be an object of strings, of at least one", remedy="send the sha256 of the tensors by their names"),
    ]


class CheckedUpdateObject(BaseModel):
    """Whether tensors are as expected."""

    success: bool
    message: str = Field(
        description="The same in words; names what differs or is missing.",
        examples=["Verified module 'transformer' update for 73 tensor(s)."],
    )


class SharedUpdateObject(BaseModel):
    """A bucket is in place, or was added to the update that it names."""

    success: Literal[True] = True
    message: str = Field(description="The same in words.", examples=["40 tensors of transformer are in place"])
    module: ModuleName
    is_complete: bool = Field(
        description="Whether the push is complete, so that samples start. Otherwise none starts before the rest has come."
    )
    weight_version: str = Field(description="The version from now on.", examples=["120"])
    num_arrived: int = Field(description="Tensors that have come since the push began; layers of an adapter.")
    num_tensors: int = Field(description="Tensors that belong to it: those of the module, or the adapter's layers.")


class DoneObject(BaseModel):
    """It is done."""

    success: Literal[True] = True
    message: str = Field(description="What.", examples=["trainer-0 is destroyed"])


class BegunObject(BaseModel):
    """An update of which the server waits for the tensors."""

    update_id: str = Field(description="Names it in the other calls.", examples=["9f86d081884c7d65"])
    module: ModuleName
    num_tensors: int = Field(description="Tensors of the module.")
    num_bytes: int = Field(description="Of these tensors, in the dtype of the engine.")
    max_body_bytes: int = Field(description="Size of a bucket.")
    idle_s: float = Field(description="Seconds of silence after which the update is dropped.")


class ArrivedObject(BaseModel):
    """What has arrived of an update. The weights are as they were."""

    update_id: str
    module: ModuleName
    num_arrived: int = Field(description="Tensors that have arrived so far.")
    num_tensors: int = Field(description="Tensors of the module.")


class AbandonedObject(BaseModel):
    """The update was dropped. The weights are as they were."""

    update_id: str
