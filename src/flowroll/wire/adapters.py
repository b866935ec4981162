"""The requests about LoRA adapters, and their answers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from flowroll.types import MAX_LORA_NAME_CHARS
from flowroll.wire.fields import Rule
from flowroll.wire.schema import Strict
from flowroll.wire.weights import MAX_PATH_CHARS, Mode, Version

_Name: TypeAlias = Annotated[
    str,
    Field(min_length=1, max_length=MAX_LORA_NAME_CHARS, description="By which requests choose it.", examples=["step-120"]),
    Rule(text=f"be a string of 1 to {MAX_LORA_NAME_CHARS} characters", remedy="send a short name"),
]
_Path: TypeAlias = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_PATH_CHARS,
        description="On the server's disk, absolute, inside a folder of --weights-root: what peft's save_pretrained wrote.",
        examples=["/runs/7/step-120"],
    ),
    Rule(text=f"be a path of 1 to {MAX_PATH_CHARS} characters", remedy="send an absolute path on the server's disk"),
]


class LoadAdapterRequest(Strict):
    """Body of POST /load_lora_adapter."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "step-120", "lora_path": "/runs/7/step-120", "weight_version": "120"}]}
    )

    lora_name: _Name
    lora_path: _Path
    merged: Annotated[
        bool,
        Field(
            description="true: added to a copy of the weights that it changes, which costs their memory and nothing in a "
            "forward. false: beside the weights, with the bits of a trainer's peft model."
        ),
        Rule(text="be true or false", remedy="leave it out for an adapter beside the weights"),
    ] = False
    weight_version: Version = None
    mode: Mode = "drain"


class AdapterFromTensorsRequest(Strict):
    """Query of POST /load_lora_adapter_from_tensors."""

    lora_name: _Name
    merged: Annotated[
        Literal["true", "false"],
        Field(description="As for /load_lora_adapter."),
        Rule(text="be true or false", remedy="leave it out for an adapter beside the weights"),
    ] = "false"
    weight_version: Version = None
    mode: Mode = "drain"


class UnloadAdapterRequest(Strict):
    """Body of POST /unload_lora_adapter."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "step-120"}]})

    lora_name: _Name
    weight_version: Version = None
    mode: Mode = "drain"


class LoraAdapterObject(BaseModel):
    """A loaded adapter."""

    name: str = Field(description="By which requests choose it, as lora_name.", examples=["step-120"])
    version: str = Field(description="Of the server's weights when it was loaded.", examples=["120"])
    sha256: str = Field(description="Over its tensors, their names and scales, as replay.adapter_checksum makes it.")
    merged: bool = Field(description="Whether it was added to a copy of the weights; else it runs beside them.")
    num_layers: int = Field(description="Linears that it changes.", examples=[240])
    num_bytes: int = Field(description="That it takes in memory, on rank 0.")


class LoraAdaptersObject(BaseModel):
    """What is loaded."""

    adapters: list[LoraAdapterObject] = Field(description="In the order of loading.")


class AdapterChangeObject(BaseModel):
    """An adapter was loaded, replaced or unloaded."""

    success: Literal[True] = True
    message: str = Field(description="The same in words.", examples=["step-120 is loaded, in version 120"])
    lora_name: str = Field(description="Which one.")
    weight_version: str = Field(description="Version of the server's weights from now on.", examples=["120"])
    previous_version: str = Field(description="The one before.", examples=["119"])
    adapter: LoraAdapterObject | None = Field(description="What has the name now; null: nothing has.")
    read_s: float = Field(description="Seconds of reading and checking, while generation went on.")
    paused_s: float = Field(description="Seconds for which no request could run.")
