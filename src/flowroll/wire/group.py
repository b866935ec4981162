"""The requests about process groups that carry new weights."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from flowroll.errors import InvalidRequestError
from flowroll.wire.arrivals import Bucketed
from flowroll.wire.fields import Items, Rule
from flowroll.wire.schema import Strict

DEFAULT_GROUP = "weight_update_group"
_MAX_PORT, _MAX_WORLD, _MAX_NAME = 65535, 4096, 128
_DTYPES = ("float64", "float32", "float16", "bfloat16")

_GroupName: TypeAlias = Annotated[
    str,
    Field(min_length=1, max_length=_MAX_NAME, description="The same in all processes of the group.", examples=["trainer-0"]),
    Rule(text=f"be a string of 1 to {_MAX_NAME} characters", remedy="leave it out for the usual name"),
]


class InitGroupRequest(Strict):
    """Body of POST /init_weights_update_group."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"master_address": "127.0.0.1", "master_port": 29600, "rank_offset": 1, "world_size": 2, "backend": "nccl"}
            ]
        }
    )

    master_address: Annotated[
        str,
        Field(
            min_length=1,
            max_length=255,
            description="Where rank 0's store listens: this machine, or a host of --weight-group-host.",
            examples=["127.0.0.1"],
        ),
        Rule(text="be a host", remedy="send the trainer's address"),
    ]
    master_port: Annotated[
        int,
        Field(ge=1, le=_MAX_PORT, description="Of the same.", examples=[29600]),
        Rule(text=f"lie in 1..{_MAX_PORT}", remedy="send the store's port"),
    ]
    rank_offset: Annotated[
        int,
        Field(ge=1, le=_MAX_WORLD, description="This server's rank; the trainer is 0.", examples=[1]),
        Rule(text="be at least 1, and below world_size", remedy="number the servers from 1"),
    ]
    world_size: Annotated[
        int,
        Field(ge=2, le=_MAX_WORLD, description="The trainer and its servers, each of which counts as one.", examples=[2]),
        Rule(text=f"lie in 2..{_MAX_WORLD}", remedy="send one more than there are servers"),
    ]
    group_name: _GroupName = DEFAULT_GROUP
    backend: Annotated[
        Literal["nccl", "gloo"],
        Field(description="gloo carries tensors on the CPU, nccl on GPUs.", examples=["nccl"]),
        Rule(text='be "nccl" or "gloo"', remedy='leave it out for "nccl"'),
    ] = "nccl"

    @model_validator(mode="after")
    def _check_rank(self) -> InitGroupRequest:
        if self.rank_offset >= self.world_size:
            raise InvalidRequestError(
                f"rank_offset must be below world_size, got {self.rank_offset} of {self.world_size}; number servers from 1.",
                field="rank_offset",
            )
        return self


class UpdateFromGroupRequest(Bucketed):
    """Body of POST /update_weights_from_distributed."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"names": ["x_pad_token"], "dtypes": ["bfloat16"], "shapes": [[1, 3840]]}]}
    )

    names: Annotated[
        Items[str],
        Field(
            min_length=1,
            description="Of the tensors, in the order in which rank 0 broadcasts them.",
            examples=[["x_pad_token"]],
        ),
        Rule(text="be a list of at least one name", remedy="name the tensors that are broadcast"),
    ]
    dtypes: Annotated[
        Items[Annotated[str, Field(max_length=32)]],
        Field(description="Of each.", examples=[["bfloat16"]]),
        Rule(text="be a list of dtypes", remedy="send one for each name"),
    ]
    shapes: Annotated[
        Items[Annotated[Items[Annotated[int, Field(ge=0, le=2**48)]], Field(max_length=16)]],
        Field(description="Of each, whole.", examples=[[[1, 3840]]]),
        Rule(text="be a list of shapes", remedy="send one for each name"),
    ]
    group_name: _GroupName = DEFAULT_GROUP
    load_format: Annotated[
        Literal["flattened_bucket"] | None,
        Field(
            description="Whether they are broadcast as one tensor of bytes; null: one by one.", examples=["flattened_bucket"]
        ),
        Rule(text='be null or "flattened_bucket"', remedy="leave it out for one by one"),
    ] = None

    @model_validator(mode="after")
    def _check_lengths(self) -> UpdateFromGroupRequest:
        for name in ("dtypes", "shapes"):
            if len(getattr(self, name)) != len(self.names):
                given = f"{len(getattr(self, name))} for {len(self.names)}"
                raise InvalidRequestError(f"{name} must have one entry for each name, got {given}; send all.", field=name)
        for dtype in self.dtypes:
            if dtype.removeprefix("torch.") not in _DTYPES:
                raise InvalidRequestError(
                    f"dtypes must be of {', '.join(_DTYPES)}, got {dtype}; send weights in one of these.", field="dtypes"
                )
        return self


class DestroyGroupRequest(Strict):
    """Body of POST /destroy_weights_update_group."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"group_name": "trainer-0"}]})

    group_name: _GroupName = DEFAULT_GROUP
