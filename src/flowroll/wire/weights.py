"""The requests about weights, and their answers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flowroll.errors import InvalidRequestError
from flowroll.types import MAX_VERSION_CHARS, ModuleName, WeightUpdate
from flowroll.wire.fields import Items, Rule
from flowroll.wire.schema import Strict

MAX_PATH_CHARS = 4096
# The parts of a checkpoint, as a rule lists them.
MODULES = " or ".join(f'"{name}"' for name in get_args(ModuleName)).replace(" or ", ", ", len(get_args(ModuleName)) - 2)

Updatable: TypeAlias = Literal["transformer", "vae"]
_ModulePath: TypeAlias = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_PATH_CHARS,
        description="On the server's disk, absolute, inside a folder of --weights-root: a checkpoint folder, whose subfolder "
        "of the module's name is read; the module's own folder; or one .safetensors file.",
        examples=["/runs/7/step-120"],
    ),
    Rule(text=f"be a path of 1 to {MAX_PATH_CHARS} characters", remedy="send an absolute path on the server's disk"),
]
_Module: TypeAlias = Annotated[
    ModuleName,
    Field(description="Part of the checkpoint.", examples=["transformer"]),
    Rule(text=f"be {MODULES}", remedy="choose one of these"),
]
Version: TypeAlias = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_VERSION_CHARS,
        description="Version of the new weights. null: one more than the highest number that a version had so far.",
        examples=["120"],
    ),
    Rule(text=f"be null or a string of 1 to {MAX_VERSION_CHARS} characters", remedy="leave it out for a counted one"),
]

Mode: TypeAlias = Annotated[
    Literal["drain", "abort"],
    Field(
        description="What becomes of the requests that run: they finish first, or are done again, wholly, with the new "
        "weights.",
        examples=["drain"],
    ),
    Rule(text='be "drain" or "abort"', remedy='leave it out for "drain"'),
]


class Targeted(Strict):
    """What the requests of SGLang-Diffusion's clients for an update have in common."""

    module: Annotated[
        Updatable | None,
        Field(description="What to update. null: the transformer.", examples=["transformer"]),
        Rule(text='be null, "transformer" or "vae"', remedy="leave it out for the transformer"),
    ] = None
    weight_version: Version = None
    mode: Mode = "drain"
    target_modules: Annotated[
        Items[Updatable] | None,
        Field(
            min_length=1,
            max_length=1,
            description="The same as `module`, as SGLang-Diffusion's clients send it: a list of one.",
            examples=[["transformer"]],
        ),
        Rule(text='be null or a list of one of "transformer" and "vae"', remedy="send one update for each module"),
    ] = None
    flush_cache: Annotated[
        bool | None,
        Field(description="Accepted for compatibility; there is no cache that outlives weights.", examples=[True]),
        Rule(text="be null, true or false", remedy="leave it out"),
    ] = None

    @model_validator(mode="after")
    def _check_one_name(self) -> Targeted:
        if self.module is not None and self.target_modules is not None:
            raise InvalidRequestError(
                f"target_modules must not be given beside module, got {self.target_modules}; send one of the two.",
                field="target_modules",
            )
        return self

    @property
    def chosen_module(self) -> ModuleName:
        """What is to be updated."""
        return self.module or (self.target_modules or ["transformer"])[0]


class UpdateFromDiskRequest(Targeted):
    """Body of POST /update_weights_from_disk."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model_path": "/runs/7/step-120", "weight_version": "120"}]})

    model_path: _ModulePath


class ChecksumRequest(Strict):
    """Body of POST /get_weights_checksum."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"module_names": ["transformer"]}]})

    module_names: Annotated[
        Items[_Module] | None,
        Field(
            min_length=1, max_length=5, description="Parts of the checkpoint. null: all of them.", examples=[["transformer"]]
        ),
        Rule(text=f"be null or a list of {MODULES}", remedy="leave it out for all"),
    ] = None


def first_wrong(value: object) -> object:
    """Of an object in which values are no strings the first of these alone: each would make an error of its own."""
    wrong = ((name, one) for name, one in value.items() if not isinstance(one, str)) if isinstance(value, dict) else ()
    return next(({name: one} for name, one in wrong), value)


class VerifyRequest(Strict):
    """Body of POST /verify_weights."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"expected": {"proj_out.weight": "9f86d08..."}}]})

    module: _Module = "transformer"
    expected: Annotated[
        dict[str, str],
        BeforeValidator(first_wrong),
        Field(
            description="sha256 of the raw bytes of every tensor of the module, as hexadecimal digits, by its name.",
            examples=[{"proj_out.weight": "9f86d08..."}],
        ),
        Rule(text="be an object of strings", remedy="send every tensor's sha256 by its name"),
    ]


class UpdateObject(BaseModel):
    """The weights were exchanged."""

    success: Literal[True] = True
    message: str = Field(description="The same in words.", examples=["transformer is of version 120, was of 119"])
    module: ModuleName = Field(description="What was changed.")
    weight_version: str = Field(description="The version from now on.", examples=["120"])
    previous_version: str = Field(description="The one before.", examples=["119"])
    num_tensors: int = Field(description="Tensors of the module.")
    num_bytes: int = Field(description="Of these tensors in memory, on rank 0.")
    read_s: float = Field(description="Seconds of reading and checking, while generation went on.")
    paused_s: float = Field(description="Seconds for which no request could run.")

    @classmethod
    def of(cls, update: WeightUpdate) -> UpdateObject:
        """What is said of an update."""
        message = f"{update.module} is of version {update.weight_version}, was of {update.previous_version}"
        return cls(message=message, **dataclasses.asdict(update))


class ChecksumsObject(BaseModel):
    """sha256 over the names and tensors of each module that was asked for."""

    transformer: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    text_encoder_3: str | None = None
    vae: str | None = None


class VerifiedObject(BaseModel):
    """Every tensor is as expected."""

    success: Literal[True] = True
    message: str = Field(description="The same in words.", examples=["77 tensors are as expected"])
    module: ModuleName
    weight_version: str = Field(description="Of the weights that were compared.", examples=["120"])
    num_tensors: int
