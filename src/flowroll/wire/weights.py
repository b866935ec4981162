"""The requests about weights and LoRA adapters on the server's disk, and their answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from flowroll.errors import InvalidRequestError
from flowroll.types import (
    MAX_LORA_NAME_CHARS,
    AdapterChange,
    LoraAdapter,
    ModuleName,
    WeightUpdate,
    check_lora_name,
    check_version,
)
from flowroll.wire import fields
from flowroll.wire.fields import Request, about

Updatable: TypeAlias = Literal["transformer", "vae"]
_LoraName: TypeAlias = Annotated[
    Annotated[str, Meta(min_length=1, max_length=MAX_LORA_NAME_CHARS)], about("step-120", "send a short name")
]
_BESIDE = "leave it out for an adapter beside the weights"


class Versioned(Request, kw_only=True, frozen=True):
    """What the requests that may name a version have in common.

    Attributes:
        weight_version: Version of the new weights. null: one more than the highest number that a version had so far.
    """

    weight_version: fields.Version = None

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses a name that no version can have."""
        if self.weight_version is not None:
            check_version(self.weight_version, "weight_version")


class Changing(Versioned, kw_only=True, frozen=True):
    """What the requests that change the policy have in common.

    Attributes:
        mode: What becomes of the requests that run: they finish first, or are done again, wholly, with the new weights.
    """

    mode: fields.Mode = "drain"


class Targeted(Changing, kw_only=True, frozen=True):
    """What the requests of SGLang-Diffusion's clients for an update have in common.

    Attributes:
        module: What to update. null: the transformer.
        target_modules: The same as `module`, as SGLang-Diffusion's clients send it: a list of one.
        flush_cache: Accepted for compatibility; there is no cache that outlives weights.
    """

    module: Annotated[Updatable | None, about("transformer", "leave it out for the transformer")] = None
    target_modules: Annotated[
        Annotated[list[Updatable], Meta(min_length=1, max_length=1)] | None,
        about(["transformer"], "send one update for each module", 'be null or a list of one of "transformer" and "vae"'),
    ] = None
    flush_cache: Annotated[bool | None, about(True, "leave it out")] = None

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses two names of the module."""
        super().check(sent)
        if self.module is not None and self.target_modules is not None:
            raise InvalidRequestError(
                f"target_modules must not be given beside module, got {self.target_modules}; send one of the two.",
                field="target_modules",
            )

    @property
    def chosen_module(self) -> ModuleName:
        """What is to be updated."""
        return self.module or (self.target_modules or ["transformer"])[0]


class UpdateFromDiskRequest(Targeted, kw_only=True, frozen=True):
    """Body of POST /update_weights_from_disk.

    Attributes:
        model_path: On the server's disk, absolute, inside a folder of --weights-root: a checkpoint folder, whose subfolder of
            the module's name is read; the module's own folder; or one .safetensors file.
    """

    EXAMPLES = ({"model_path": "/runs/7/step-120", "weight_version": "120"},)

    model_path: fields.DiskPath


class ChecksumRequest(Request, kw_only=True, frozen=True):
    """Body of POST /get_weights_checksum.

    Attributes:
        module_names: Parts of the checkpoint. null: all of them.
    """

    EXAMPLES = ({"module_names": ["transformer"]},)

    module_names: Annotated[
        Annotated[list[ModuleName], Meta(min_length=1, max_length=5)] | None, about(["transformer"], "leave it out for all")
    ] = None


class VerifyRequest(Request, kw_only=True, frozen=True):
    """Body of POST /verify_weights.

    Attributes:
        module: Part of the checkpoint.
        expected: sha256 of the raw bytes of every tensor of the module, as hexadecimal digits, by its name.
    """

    EXAMPLES = ({"expected": {"proj_out.weight": "9f86d08..."}},)

    module: fields.Module = "transformer"
    expected: Annotated[
        dict[str, str],
        about({"proj_out.weight": "9f86d08..."}, "send every tensor's sha256 by its name", "be an object of strings"),
    ]


class _AdapterRequest(Changing, kw_only=True, frozen=True):
    """What the requests about one adapter have in common.

    Attributes:
        lora_name: The name by which requests choose it.
    """

    lora_name: _LoraName

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses a name that no adapter can have."""
        check_lora_name(self.lora_name)
        super().check(sent)


class UnloadAdapterRequest(_AdapterRequest, kw_only=True, frozen=True):
    """Body of POST /unload_lora_adapter."""

    EXAMPLES = ({"lora_name": "step-120"},)


class LoadAdapterRequest(_AdapterRequest, kw_only=True, frozen=True):
    """Body of POST /load_lora_adapter.

    Attributes:
        lora_path: On the server's disk, absolute, inside a folder of --weights-root: what peft's save_pretrained wrote.
        merged: true: added to a copy of the weights that it changes, which costs their memory and nothing in a forward. false:
            beside the weights, with the bits of a trainer's peft model.
    """

    EXAMPLES = ({"lora_name": "step-120", "lora_path": "/runs/7/step-120", "weight_version": "120"},)

    lora_path: fields.DiskPath
    merged: Annotated[bool, about(False, _BESIDE)] = False


class AdapterFromTensorsRequest(_AdapterRequest, kw_only=True, frozen=True):
    """Query of POST /load_lora_adapter_from_tensors.

    Attributes:
        merged: The same as for /load_lora_adapter.
    """

    merged: Annotated[Literal["true", "false"], about("false", _BESIDE, "be true or false")] = "false"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateObject(WeightUpdate):
    """The weights were exchanged.

    Attributes:
        success: Always.
        message: What this answer says, in words.
    """

    success: Literal[True] = True
    message: Annotated[str, Meta(examples=["transformer is of version 120, was of 119"])]

    @classmethod
    def of(cls, update: WeightUpdate) -> UpdateObject:
        """Returns what is said of an update."""
        message = f"{update.module} is of version {update.weight_version}, was of {update.previous_version}"
        return cls(message=message, **dataclasses.asdict(update))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksumsObject:
    """sha256 over the names and tensors of each module that was asked for.

    Attributes:
        transformer: The checksum of the transformer.
        text_encoder: The checksum of the text encoder.
        vae: The checksum of the VAE.
    """

    transformer: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    text_encoder_3: str | None = None
    vae: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedObject:
    """Every tensor is as expected.

    Attributes:
        success: Always.
        message: What this answer says, in words.
        module: Part of the checkpoint.
        weight_version: The version of the weights that were compared.
        num_tensors: Tensors that were compared.
    """

    success: Literal[True] = True
    message: Annotated[str, Meta(examples=["77 tensors are as expected"])]
    module: ModuleName
    weight_version: str
    num_tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdaptersObject:
    """The loaded adapters.

    Attributes:
        adapters: The adapters, in the order of loading.
    """

    adapters: list[LoraAdapter]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChangeObject(AdapterChange):
    """An adapter was loaded, replaced or unloaded.

    Attributes:
        success: Always.
        message: What this answer says, in words.
    """

    success: Literal[True] = True
    message: Annotated[str, Meta(examples=["step-120 is loaded, in version 120"])]

    @classmethod
    def of(cls, change: AdapterChange, done: str) -> AdapterChangeObject:
        """Returns what is said of a change; `done` is its verb."""
        message = f"{change.lora_name} is {done}, in version {change.weight_version}"
        return cls(message=message, **{field.name: getattr(change, field.name) for field in dataclasses.fields(change)})
