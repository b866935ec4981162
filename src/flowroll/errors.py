"""Every exception flowroll raises, with its stable code and HTTP status.

Owns the mapping between an error's class, its wire code and its HTTP status; the server writes it and the client reads it
back, so both sides raise the same class. It must not know about models, tensors or HTTP libraries.

    FlowrollError
    ├── InvalidRequestError      422  a value breaks a rule; names field, rule, value and remedy
    ├── MalformedRequestError    400  the body is not what its content type says
    ├── UnauthorizedError        401  the bearer token is missing or wrong
    ├── ForbiddenError           403  the server was not started with leave to do this
    ├── NotFoundError            404  no such route or model
    ├── DeadlineExceededError    408  the request's own deadline passed before its answer was made
    ├── PausedError              409  generation is paused and takes no new request
    ├── AsleepError              409  the memory of the weights is released
    ├── OutdatedWeightsError     409  the weights are older than the request demands
    ├── WeightsBusyError         409  another update of the weights is under way
    ├── WeightsMismatchError     409  the weights are not those that the caller expects
    ├── WeightsRejectedError     422  new weights cannot be taken; the old ones stay
    ├── PayloadTooLargeError     413  the body is larger than the server accepts
    ├── QueueFullError           429  too many requests are waiting; carries retry_after_s
    ├── CancelledRequestError    499  the caller took the request back, or went away
    ├── EngineError              500  the model failed while it ran this request
    │   └── RankLostError        503  a rank of the engine died or stalled; the engine is down
    ├── ShuttingDownError        503  the engine stops and takes no more work
    ├── CheckpointError           -   the folder cannot be loaded as a checkpoint
    ├── UnsupportedModelError     -   the checkpoint is fine, but of no family that flowroll knows
    ├── RolloutFileError          -   a saved rollout cannot be read
    ├── ServerConnectionError     -   client side: the server cannot be reached, or broke off
    └── MissingExtraError         -   a library of an extra is not installed; an ImportError too
"""

from __future__ import annotations

import copy
from typing import ClassVar, TypeVar


class FlowrollError(Exception):
    """The base class of every error that flowroll raises on purpose.

    Args:
        message: `<subject> must <rule>, got <value>; <what to do>.`
        field: The wire or parameter name that the message is about, if one is.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequestError(FlowrollError):
    """A value of the request breaks a rule."""

    code = "invalid_request"
    status = 422

    def within(self, parent: str) -> InvalidRequestError:
        """Returns the error for a value inside `parent`; the message begins with the field's new name."""
        field = parent if self.field is None else f"{parent}.{self.field}"
        return InvalidRequestError(f"{parent}.{self.message}" if self.field else f"{parent}: {self.message}", field=field)

    def renamed(self, field: str) -> InvalidRequestError:
        """Returns the error under another name of its field; the message begins with that name."""
        message = self.message
        if self.field is not None and message.startswith(self.field):
            message = field + message.removeprefix(self.field)
        return InvalidRequestError(message, field=field)


class MalformedRequestError(FlowrollError):
    """The body cannot be parsed as its content type says."""

    code = "malformed_request"
    status = 400


class UnauthorizedError(FlowrollError):
    """The request carries no valid bearer token."""

    code = "unauthorized"
    status = 401


class ForbiddenError(FlowrollError):
    """The server was not started with leave to do this, e.g. to read that path."""

    code = "forbidden"
    status = 403


class OutdatedWeightsError(FlowrollError):
    """The weights are older than the request's `min_weight_version`, or behind the newest by more than its `max_staleness`."""

    code = "outdated_weights"
    status = 409


class WeightsMismatchError(FlowrollError):
    """The weights in memory do not have the checksums that the caller expects."""

    code = "weights_mismatch"
    status = 409


class WeightsBusyError(FlowrollError):
    """Another update of the weights is under way; wait until it ends, or abort it."""

    code = "weights_busy"
    status = 409


class WeightsRejectedError(FlowrollError):
    """New weights are not those of the module, or cannot be read; weights, version and checksum are unchanged."""

    code = "weights_rejected"
    status = 422


class NotFoundError(FlowrollError):
    """There is no route, model, update or other object of that name."""

    code = "not_found"
    status = 404


class DeadlineExceededError(FlowrollError):
    """The request's deadline passed before its answer was ready; its partial work is dropped."""

    code = "deadline_exceeded"
    status = 408


class PausedError(FlowrollError):
    """Generation is paused; continue it, or send the request to another replica."""

    code = "paused"
    status = 409


class AsleepError(FlowrollError):
    """The memory of the weights is released; wake the engine, or send the request to another replica."""

    code = "asleep"
    status = 409


class CancelledRequestError(FlowrollError):
    """The request was aborted by its id, or its client disconnected; its partial work is dropped."""

    code = "cancelled"
    status = 499


class PayloadTooLargeError(FlowrollError):
    """The request body is larger than the server accepts."""

    code = "payload_too_large"
    status = 413


class QueueFullError(FlowrollError):
    """Too many requests wait already; try again after `retry_after_s` seconds."""

    code = "queue_full"
    status = 429

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


class EngineError(FlowrollError):
    """The engine failed while it ran an accepted request."""

    code = "engine_error"
    status = 500


class RankLostError(EngineError):
    """A rank of the engine died, stalled, or cannot go on; nothing runs on this engine any more."""

    code = "rank_lost"
    status = 503


class ShuttingDownError(FlowrollError):
    """The engine is closing; the request was not run, or not to its end."""

    code = "shutting_down"
    status = 503


class CheckpointError(FlowrollError):
    """A folder is not a loadable checkpoint: no index, a missing file, a truncated or mismatched weight."""

    code = "checkpoint"


class UnsupportedModelError(FlowrollError):
    """flowroll does not support the checkpoint's pipeline, scheduler or configuration."""

    code = "unsupported_model"


class RolloutFileError(FlowrollError):
    """A rollout file is missing, truncated or of another schema."""

    code = "rollout_file"


class ServerConnectionError(FlowrollError):
    """The client could not reach the server, or the answer broke off.

    Attributes:
        is_unanswered: Whether no byte of an answer had come, so that another server may be asked.
    """

    code = "server_connection"
    is_unanswered = False


class MissingExtraError(FlowrollError, ImportError):
    """A library that an extra of flowroll brings is not installed; the message says which `pip install` brings it."""

    code = "missing_extra"


_WIRE_ERRORS: dict[str, type[FlowrollError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        MalformedRequestError,
        UnauthorizedError,
        ForbiddenError,
        OutdatedWeightsError,
        WeightsBusyError,
        WeightsMismatchError,
        WeightsRejectedError,
        NotFoundError,
        DeadlineExceededError,
        PausedError,
        AsleepError,
        CancelledRequestError,
        PayloadTooLargeError,
        QueueFullError,
        EngineError,
        RankLostError,
        ShuttingDownError,
    )
}


ErrorT = TypeVar("ErrorT", bound=FlowrollError)


def fresh(error: ErrorT) -> ErrorT:
    """Returns a copy of an error to raise or to hand out, with all fields and without traceback.

    An error that is kept must not be raised itself: each raise would add its stack frames, and the objects in them, to it.
    """
    return copy.copy(error)


def error_from_wire(code: str, message: str, field: str | None) -> FlowrollError:
    """Makes the exception that a server's `{"error": {...}}` body describes; an unknown code becomes an `EngineError`."""
    return _WIRE_ERRORS.get(code, EngineError)(message, field=field)
