"""The requests about process groups that carry new weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from flowroll.errors import InvalidRequestError
from flowroll.wire.fields import Request, about
from flowroll.wire.weight_updates import Bucketed

DEFAULT_GROUP = "weight_update_group"
_MAX_PORT, _MAX_WORLD, _MAX_NAME = 65535, 4096, 128
_DTYPES = ("float64", "float32", "float16", "bfloat16")

_GroupName: TypeAlias = Annotated[
    Annotated[str, Meta(min_length=1, max_length=_MAX_NAME)], about("trainer-0", "leave it out for the usual name")
]
_Shape: TypeAlias = Annotated[list[Annotated[int, Meta(ge=0, le=2**48)]], Meta(max_length=16)]


class InitGroupRequest(Request, kw_only=True, frozen=True):
    """Body of POST /init_weights_update_group.

    Attributes:
        master_address: The address on which rank 0's store listens: this machine, or a host of --weight-group-host.
        master_port: The port of the store.
        rank_offset: The rank of this server; the trainer has rank 0.
        world_size: The number of processes: the trainer and its servers, each of which counts as one.
        group_name: The name of the group, the same in all of its processes.
        backend: gloo carries tensors on the CPU, nccl on GPUs.
    """

    EXAMPLES = ({"master_address": "127.0.0.1", "master_port": 29600, "rank_offset": 1, "world_size": 2, "backend": "nccl"},)

    master_address: Annotated[
        Annotated[str, Meta(min_length=1, max_length=255)], about("127.0.0.1", "send the trainer's address", "be a host")
    ]
    master_port: Annotated[
        Annotated[int, Meta(ge=1, le=_MAX_PORT)], about(29600, "send the store's port", f"lie in 1..{_MAX_PORT}")
    ]
    rank_offset: Annotated[
        Annotated[int, Meta(ge=1, le=_MAX_WORLD)],
        about(1, "number the servers from 1", "be at least 1, and below world_size"),
    ]
    world_size: Annotated[
        Annotated[int, Meta(ge=2, le=_MAX_WORLD)],
        about(2, "send one more than there are servers", f"lie in 2..{_MAX_WORLD}"),
    ]
    group_name: _GroupName = DEFAULT_GROUP
    backend: Annotated[Literal["nccl", "gloo"], about("nccl", 'leave it out for "nccl"')] = "nccl"

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses a rank that the group does not have."""
        if self.rank_offset >= self.world_size:
            raise InvalidRequestError(
                f"rank_offset must be below world_size, got {self.rank_offset} of {self.world_size}; number servers from 1.",
                field="rank_offset",
            )


class UpdateFromGroupRequest(Bucketed, kw_only=True, frozen=True):
    """Body of POST /update_weights_from_distributed.

    Attributes:
        names: The names of the tensors, in the order in which rank 0 broadcasts them.
        dtypes: The dtype of each tensor.
        shapes: The shape of each whole tensor.
        group_name: The name of the group, the same in all of its processes.
        load_format: Whether the tensors are broadcast as one tensor of bytes; null: one by one.
        sha256: sha256 over the bytes of the tensors, one after the other, as hexadecimal digits, with which what arrives is
            compared. null: it is not; bytes of another dtype of the same size would be taken.
    """

    EXAMPLES = ({"names": ["x_pad_token"], "dtypes": ["bfloat16"], "shapes": [[1, 3840]]},)

    names: Annotated[
        Annotated[list[str], Meta(min_length=1)],
        about(["x_pad_token"], "name the tensors that are broadcast", "be a list of at least one name"),
    ]
    dtypes: Annotated[
        list[Annotated[str, Meta(max_length=32)]], about(["bfloat16"], "send one for each name", "be a list of dtypes")
    ]
    shapes: Annotated[list[_Shape], about([[1, 3840]], "send one for each name", "be a list of shapes")]
    group_name: _GroupName = DEFAULT_GROUP
    load_format: Annotated[Literal["flattened_bucket"] | None, about("flattened_bucket", "leave it out for one by one")] = None
    sha256: Annotated[
        Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")] | None,
        about("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "leave it out", "be null or 64 hex digits"),
    ] = None

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses lists of different lengths, and dtypes that weights do not have."""
        super().check(sent)
        for name in ("dtypes", "shapes"):
            if len(getattr(self, name)) != len(self.names):
                given = f"{len(getattr(self, name))} for {len(self.names)}"
                raise InvalidRequestError(f"{name} must have one entry for each name, got {given}; send all.", field=name)
        for dtype in self.dtypes:
            if dtype.removeprefix("torch.") not in _DTYPES:
                raise InvalidRequestError(
                    f"dtypes must be of {', '.join(_DTYPES)}, got {dtype}; send weights in one of these.", field="dtypes"
                )


class DestroyGroupRequest(Request, kw_only=True, frozen=True):
    """Body of POST /destroy_weights_update_group.

    Attributes:
        group_name: The name of the group, the same in all of its processes.
    """

    EXAMPLES = ({"group_name": "trainer-0"},)

    group_name: _GroupName = DEFAULT_GROUP
