"""The requests that steer generation and the memory of the weights, their answers, and the answer of an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from flowroll.errors import InvalidRequestError
from flowroll.types import MAX_REQUEST_ID_CHARS, MemoryChange
from flowroll.wire import fields
from flowroll.wire.fields import Request, about


class AbortRequest(Request, kw_only=True, frozen=True):
    """Body of POST /abort_request: one request id, or all requests.

    Attributes:
        request_id: Id of the request to abort.
        rid: Another name of `request_id`, as SGLang's clients send it; an empty text means none.
        abort_all: Whether every request is aborted.
        keep_partial: Whether a request of which samples are finished is answered with these, in place of 499. Each sample's
            left_out then says which others are missing.
    """

    EXAMPLES = ({"request_id": "step-12-prompt-3"}, {"abort_all": True}, {"abort_all": True, "keep_partial": True})

    request_id: fields.RequestId = None
    rid: Annotated[
        Annotated[str, Meta(max_length=MAX_REQUEST_ID_CHARS)] | None, about("step-12-prompt-3", "send the request's id")
    ] = None
    abort_all: Annotated[bool, about(True, "leave it out to abort one id")] = False
    keep_partial: Annotated[bool, about(True, "leave it out to drop what is finished")] = False

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses anything but one id or `abort_all`."""
        count = len([name for name in (self.request_id, self.rid) if name]) + self.abort_all
        if count != 1:
            raise InvalidRequestError(
                f"request_id must be given, or abort_all be true, but not both, got {count} of them; say which request is "
                "meant.",
                field="request_id",
            )

    @property
    def meant(self) -> str | None:
        """The id of the request to abort; None: all requests."""
        return self.request_id or self.rid or None


class PauseRequest(Request, kw_only=True, frozen=True):
    """Body of POST /pause_generation; it may be left out.

    Attributes:
        mode: What happens to the requests that run: they finish, or they stop at their next step until generation continues.
    """

    EXAMPLES = ({"mode": "freeze"},)

    mode: Annotated[Literal["finish", "freeze"], about("freeze", 'leave it out for "finish"')] = "finish"


class ContinueRequest(Request, kw_only=True, frozen=True):
    """Body of POST /continue_generation and /resume: an empty object; it may be left out."""

    EXAMPLES = ({},)


class ResumeRequest(Request, kw_only=True, frozen=True):
    """Body of POST /resume_memory_occupation; it may be left out.

    Attributes:
        tags: Which memory is meant, as SGLang's clients send it. null: everything. Of the three tags only weights exist here;
            the others change nothing.
    """

    EXAMPLES = ({},)

    tags: Annotated[
        Annotated[list[Literal["weights", "kv_cache", "cuda_graph"]], Meta(min_length=1)] | None,
        about(["weights"], "leave it out for everything"),
    ] = None

    @property
    def means_weights(self) -> bool:
        """Whether the request concerns the weights."""
        return self.tags is None or "weights" in self.tags


class ReleaseRequest(ResumeRequest, kw_only=True, frozen=True):
    """Body of POST /release_memory_occupation; it may be left out.

    Attributes:
        mode: Where the weights go. offload: to pinned memory of the host; on a CPU the weights stay and nothing is released.
            disk: to a file without a name in the server's folder for temporary files. discard: the transformer's weights are
            not kept; after the memory is resumed, the server answers as in sleep until an update has brought all of them.
    """

    EXAMPLES = ({"mode": "offload"},)

    mode: Annotated[Literal["offload", "disk", "discard"], about("offload", 'leave it out for "offload"')] = "offload"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetail:
    """What went wrong.

    Attributes:
        code: Stable name of the kind of error.
        message: The subject, the rule, the value and the remedy.
        field: The field of the request that the message is about.
    """

    code: Annotated[str, Meta(examples=["invalid_request"])]
    message: Annotated[str, Meta(examples=["height must be a multiple of 16 for qwen_image, got 1000; use 992 or 1008."])]
    field: Annotated[str | None, Meta(examples=["height"])] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """The body of every answer that is not a success.

    Attributes:
        error: What went wrong.
    """

    error: ErrorDetail


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortedObject:
    """What was aborted. Each of these requests ends with status 499, or with its finished samples (keep_partial).

    Attributes:
        num_aborted: Number of requests that waited or ran under this id.
    """

    num_aborted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationObject:
    """The state of generation.

    Attributes:
        is_paused: Whether new requests are refused.
        num_running: Number of requests that were started and have not ended.
        num_waiting: Number of requests that wait; they keep their places.
    """

    is_paused: bool
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryObject(MemoryChange):
    """The state of the memory of the weights.

    Attributes:
        success: Always true.
        is_asleep: Whether the memory of the weights is released.
    """

    success: Literal[True] = True
    is_asleep: bool
