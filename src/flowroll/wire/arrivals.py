"""The requests about new weights that arrive in buckets, and their answers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from flowroll.types import ModuleName
from flowroll.wire.fields import Items, Rule
from flowroll.wire.schema import Strict
from flowroll.wire.weights import Mode, Targeted, Updatable, Version

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


class UpdateFromTensorRequest(Targeted):
    """Body of POST /update_weights_from_tensor."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"serialized_named_tensors": ["gASV..."], "load_format": "flattened_bucket"}]}
    )

    serialized_named_tensors: Annotated[
        Items[str],
        Field(
            min_length=1,
            description="Pickled named tensors as base64, whole ones: an entry for each rank, of which only the "
            "first is read; what the others name is not released.",
            examples=[["gASV..."]],
        ),
        Rule(text="be a list of at least one string", remedy="send what MultiprocessingSerializer makes"),
    ]
    load_format: Annotated[
        Literal["flattened_bucket"] | None,
        Field(description="What is pickled; null: (name, tensor) pairs.", examples=["flattened_bucket"]),
        Rule(text='be null or "flattened_bucket"', remedy="leave it out for named tensors"),
    ] = None


class SharedUpdateObject(BaseModel):
    """What has arrived; once nothing is missing, the weights are exchanged."""

    success: Literal[True] = True
    message: str = Field(description="The same in words.", examples=["40 of 73 tensors have arrived"])
    module: ModuleName
    is_complete: bool = Field(description="Whether the weights were exchanged.")
    weight_version: str = Field(description="The version from now on.", examples=["120"])
    num_arrived: int = Field(description="Tensors that have arrived so far.")
    num_tensors: int = Field(description="Tensors of the module.")


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
