"""The requests about new weights that arrive in buckets, and their answers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from flowroll.types import ModuleName
from flowroll.wire.fields import Rule
from flowroll.wire.schema import Strict
from flowroll.wire.weights import Updatable, Version

_Module: TypeAlias = Annotated[
    Updatable,
    Field(description="What to update.", examples=["transformer"]),
    Rule(text='be "transformer" or "vae"', remedy="leave it out for the transformer"),
]
_Mode: TypeAlias = Annotated[
    Literal["drain", "abort"],
    Field(
        description="What becomes of the requests that run: they finish first, or are done again, wholly, with the new "
        "weights.",
        examples=["drain"],
    ),
    Rule(text='be "drain" or "abort"', remedy='leave it out for "drain"'),
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

    mode: _Mode = "drain"


class BodyUpdateRequest(Strict):
    """Query of POST /update_weights_from_safetensors."""

    module: _Module = "transformer"
    weight_version: Version = None
    mode: _Mode = "drain"


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
