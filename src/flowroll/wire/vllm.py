"""The requests of vLLM's HTTP routes for reinforcement learning, and their answers.

Source: vLLM's `entrypoints/serve/dev/rlhf/api_router.py` and `distributed/weight_transfer/clients.py`, and its page on weight
transfer, of versions 0.25 to 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from flowroll.errors import InvalidRequestError
from flowroll.types import MAX_REQUEST_ID_CHARS
from flowroll.wire.fields import Request, about
from flowroll.wire.weights import Versioned

# The one group of a server that these routes join, as vLLM has one.
VLLM_GROUP = "vllm-weight-transfer"
# Of vLLM, where it is not said.
DEFAULT_PACKED_BYTES = 2**30
_Flag = Literal["true", "false", "True", "False", "1", "0"]


class PauseQuery(Request, kw_only=True, frozen=True):
    """The query of POST /pause.

    Attributes:
        mode: What becomes of the requests that wait or run. abort: they end in a 499; wait: they finish, before this is
            answered; keep: they stop where they are and go on at /resume.
        wait_for_inflight_requests: The old name of mode=wait.
        clear_cache: Taken for clients that send it; there is no cache of prompts.
    """

    mode: Annotated[Literal["abort", "wait", "keep"], about("wait", 'leave it out for "abort"')] = "abort"
    wait_for_inflight_requests: Annotated[_Flag, about("false", "leave it out, and use mode=wait")] = "false"
    clear_cache: Annotated[_Flag, about("true", "leave it out")] = "true"

    @property
    def meant(self) -> Literal["abort", "wait", "keep"]:
        """The mode, by either of its names."""
        return "wait" if self.wait_for_inflight_requests in ("true", "True", "1") else self.mode


class WorldQuery(Request, kw_only=True, frozen=True):
    """The query of GET /get_world_size.

    Attributes:
        include_dp: Taken for clients that send it; a server is one engine.
    """

    include_dp: Annotated[_Flag, about("true", "leave it out")] = "true"


class InitInfo(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the trainer's process group is.

    Attributes:
        master_address: The address on which rank 0's store listens: this machine, or a host of --weight-group-host.
        master_port: The port of the store.
        rank_offset: The rank of this server; the trainer has rank 0.
        world_size: The trainer and its servers, each of which counts as one, as /get_world_size says.
        backend: gloo carries tensors on the CPU, nccl on GPUs.
        packed: Whether tensors are broadcast as tensors of uint8 that hold the bytes of several in a row; false: one by one.
            Newer releases of vLLM say it here for all updates, and do so unless they are told otherwise; older ones say it in
            each update.
        packed_buffer_size_bytes: Each packed tensor but the last ends with the first one that takes it over this size.
        packed_num_buffers: How many the sender has under way; taken for clients that send it.
    """

    master_address: Annotated[str, Meta(min_length=1, max_length=255)]
    master_port: Annotated[int, Meta(ge=1, le=65535)]
    rank_offset: Annotated[int, Meta(ge=1, le=4096)]
    world_size: Annotated[int, Meta(ge=2, le=4096)]
    backend: Literal["nccl", "gloo"] = "nccl"
    packed: bool = False
    packed_buffer_size_bytes: Annotated[int, Meta(ge=1)] = DEFAULT_PACKED_BYTES
    packed_num_buffers: int | None = None


class InitTransferRequest(Request, kw_only=True, frozen=True):
    """Body of POST /init_weight_transfer_engine.

    Attributes:
        init_info: Where the trainer's process group is.
    """

    EXAMPLES = ({"init_info": {"master_address": "127.0.0.1", "master_port": 29600, "rank_offset": 1, "world_size": 2}},)

    init_info: Annotated[
        InitInfo,
        about(
            {"master_address": "127.0.0.1", "master_port": 29600, "rank_offset": 1, "world_size": 2},
            "send master_address, master_port, rank_offset and world_size",
            "be an object that says where the process group is",
        ),
    ]

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses a rank that the group does not have."""
        info = self.init_info
        if info.rank_offset >= info.world_size:
            raise InvalidRequestError(
                f"init_info.rank_offset must be below world_size, got {info.rank_offset} of {info.world_size}; number servers "
                "from 1.",
                field="init_info.rank_offset",
            )


class StartUpdateRequest(Request, kw_only=True, frozen=True):
    """Body of POST /start_weight_update; it may be left out.

    Attributes:
        is_checkpoint_format: Taken for clients that send it: the names are always those of the checkpoint.
    """

    EXAMPLES = ({},)

    is_checkpoint_format: Annotated[bool, about(True, "leave it out")] = True


class UpdateInfo(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The tensors that rank 0 broadcasts, in this order.

    Attributes:
        names: Their names in the transformer's state_dict.
        dtype_names: Their dtypes, e.g. "bfloat16".
        shapes: Their shapes.
        packed: Whether they are packed, if `init_info` did not say so; false: they are broadcast one by one.
        packed_buffer_size_bytes: Each packed tensor but the last ends with the first one that takes it over this size.
        packed_num_buffers: How many the sender has under way; taken for clients that send it.
    """

    names: Annotated[list[str], Meta(min_length=1)]
    dtype_names: Annotated[list[str], Meta(min_length=1)]
    shapes: Annotated[list[list[int]], Meta(min_length=1)]
    packed: bool = False
    packed_buffer_size_bytes: Annotated[int, Meta(ge=1)] = DEFAULT_PACKED_BYTES
    packed_num_buffers: int | None = None


class UpdateWeightsRequest(Request, kw_only=True, frozen=True):
    """Body of POST /update_weights.

    Attributes:
        update_info: The tensors that come.
    """

    EXAMPLES = ({"update_info": {"names": ["x_pad_token"], "dtype_names": ["bfloat16"], "shapes": [[1, 3840]]}},)

    update_info: Annotated[
        UpdateInfo,
        about(
            {"names": ["x_pad_token"], "dtype_names": ["bfloat16"], "shapes": [[1, 3840]]},
            "send names, dtype_names and shapes; CUDA IPC handles go to /update_weights_from_tensor",
            "be an object that describes broadcast tensors",
        ),
    ]


class FinishUpdateRequest(Versioned, kw_only=True, frozen=True):
    """Body of POST /finish_weight_update; it may be left out."""

    EXAMPLES = ({}, {"weight_version": "120"})


class AbortRequestsRequest(Request, kw_only=True, frozen=True):
    """Body of POST /abort_requests.

    Attributes:
        request_ids: The requests to end. null or empty: all of them.
    """

    EXAMPLES = ({"request_ids": ["step-12-prompt-3"]}, {})

    request_ids: Annotated[
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID_CHARS)]], Meta(max_length=1024)] | None,
        about(["step-12-prompt-3"], "leave it out for all requests", "be null or a list of request ids"),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusObject:
    """What became of generation.

    Attributes:
        status: "paused" or "resumed".
    """

    status: Literal["paused", "resumed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PausedObject:
    """Whether generation is paused.

    Attributes:
        is_paused: Whether no request starts until it is resumed.
    """

    is_paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightInfoObject:
    """Which weights there are.

    Attributes:
        weight_version: Their version.
    """

    weight_version: Annotated[str, Meta(examples=["120"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldObject:
    """How many members of a process group this server is.

    Attributes:
        world_size: Always 1: whatever the layout, one process receives for all ranks.
    """

    world_size: Annotated[int, Meta(examples=[1])]


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageObject:
    """What was done.

    Attributes:
        message: In words, as vLLM says it.
    """

    message: Annotated[str, Meta(examples=["Weights updated"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortedRequestsObject:
    """What was aborted.

    Attributes:
        status: Always "aborted".
        aborted: The number of requests that waited or ran.
    """

    status: Literal["aborted"] = "aborted"
    aborted: int
