"""The methods of both clients. Each makes a call and says how its answer is read. `weights` has the methods about weights.

The first parameter is the client's wire format; the others, and the docstring, are those of the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, Unpack

import msgspec
from torch import Tensor

from flowroll.client.bounds import SampleT, check_answers
from flowroll.client.exchange import (
    DEFAULT_TIMEOUT_S,
    Call,
    Steps,
    encoded,
    excerpt,
    post,
    read_object,
    reader,
)
from flowroll.errors import ServerConnectionError, ShuttingDownError
from flowroll.replay.remote import score_params, scores_of
from flowroll.replay.scoring import Scores
from flowroll.types import (
    AdapterChange,
    GeneratedImage,
    ImageFields,
    Number,
    Rollout,
    RolloutFields,
    SamplingParams,
    WeightUpdate,
)
from flowroll.types.arguments import Integers, given_fields
from flowroll.types.forks import count_leaves
from flowroll.types.images import checked_images
from flowroll.types.starts import count_samples
from flowroll.wire.codec import JSON, MSGPACK, WireFormat, decode_images, decode_rollouts, encode
from flowroll.wire.control import AbortedObject, AbortRequest
from flowroll.wire.fields import Request
from flowroll.wire.names import ABORT_ROUTE, EXTRA, GENERATE_ROUTE, ROLLOUT_ROUTE, SCORE_ROUTE
from flowroll.wire.schema import GenerateRequest, RolloutRequest
from flowroll.wire.scoring import decode_score_answer, encode_score_request
from flowroll.wire.validation import nested_request

UpdateMode: TypeAlias = Literal["drain", "abort"]
_PROBE_TIMEOUT_S, _READY_POLL_S = 5.0, 0.2
# Of a request that leaves the number to the server; it only has to compare with other requests.
_USUAL_STEPS = 28
_ACCEPT: Mapping[WireFormat, str] = {"json": JSON, "msgpack": MSGPACK}
_ABORTED = reader(msgspec.json.Decoder(AbortedObject))
UPDATE = reader(msgspec.json.Decoder(WeightUpdate))
CHANGE = reader(msgspec.json.Decoder(AdapterChange))


def rollout(
    _wire_format: WireFormat, request: str | SamplingParams | None = None, /, **values: Unpack[RolloutFields]
) -> Call[list[Rollout]]:
    """Rolls out one request, e.g. `client.rollout("a red fox", seed=42)`: one `Rollout` per sample.

    Args:
        request: The prompt, or the whole request, of which the values that differ from the defaults are sent.
        **values: Fields of `SamplingParams`; the fields that are given are sent, and always `rollout_debug_mode`, whose default
            is true over HTTP and false here.

    Raises:
        InvalidRequestError: A value breaks a rule.
        QueueFullError: Too many requests wait; the error carries `retry_after_s`.
        ServerConnectionError: The server cannot be reached, or broke off its answer.
        FlowrollError: The server raised any other error, or the client is closed.
    """
    given = {"rollout_debug_mode": False, **given_fields(request, values)}
    return _sampling(RolloutRequest, ROLLOUT_ROUTE, given, _wire_format, decode_rollouts)


def generate(
    _wire_format: WireFormat, request: str | SamplingParams | None = None, /, **values: Unpack[ImageFields]
) -> Call[list[GeneratedImage]]:
    """Generates images from text without rollout data: one `GeneratedImage` per sample.

    Args:
        request: The prompt, or the whole request without rollout fields.
        **values: Fields of `SamplingParams` other than rollout fields.

    Raises:
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    given = given_fields(request, values)
    if isinstance(request, SamplingParams):
        # Plain generation by definition; the route knows no such field.
        given.pop("rollout", None)
    return _sampling(GenerateRequest, GENERATE_ROUTE, given, _wire_format, decode_images)


def score(
    _wire_format: WireFormat,
    rollouts: Sequence[Rollout],
    *,
    steps: Integers | None = None,
    log_probs_only: bool = False,
    min_weight_version: str | None = None,
    policy: str | None = None,
) -> Call[Scores]:
    """Has the server recompute the log-probs of rollouts under its present weights: `replay.score` without a transformer.

    All steps are computed under the weights of one version, which the answer names, and each step alone: before an update the
    log-probs equal the recorded ones bit for bit. The whole call is one request.

    Args:
        rollouts: Rollouts of one or several requests, with env and trajectory.
        steps: The steps to recompute, counted from 0. None: all steps; the rollouts must then have the same length.
        log_probs_only: Whether to leave out means and velocities, which are most of the answer's bytes.
        min_weight_version: The request is refused if the server's weights are older than this version.
        policy: The policy, or the adapter, to compute with, whatever made the rollouts. None or "default": the server's present
            weights, with each rollout's own adapter.

    Raises:
        InvalidRequestError: A rollout cannot be replayed, or not by this server's model; the message names the remedy.
        OutdatedWeightsError: The server's weights are older than `min_weight_version`.
        PayloadTooLargeError: The request is too large; send fewer rollouts at a time.
        FlowrollError: The call fails for a reason that `rollout` lists.
    """
    params = score_params(rollouts, steps, log_probs_only=log_probs_only, min_weight_version=min_weight_version, policy=policy)
    body = encode_score_request(params, wire_format=_wire_format)
    asked = [sample.steps for sample in params.samples]

    def read(answer_body: bytearray, content_type: str) -> Scores:
        answer = decode_score_answer(answer_body, content_type)
        if [sample.steps for sample in answer.samples] != asked:
            raise ServerConnectionError("the answer must hold the scores that were asked for, got others; retry.")
        return scores_of(answer)

    content, content_type = b"".join(body.chunks()), body.content_type
    return Call(
        method="POST",
        path=SCORE_ROUTE,
        read=read,
        accept=_ACCEPT[_wire_format],
        content=content,
        content_type=content_type,
        max_bytes=None,
        image_steps=sum(map(len, asked)),
    )


def abort_request(_: WireFormat, request_id: str, /, *, keep_partial: bool = False) -> Call[int]:
    """Ends the requests with this id, whether they wait or run; they end in a `CancelledRequestError`. Returns their number.

    Args:
        request_id: The id.
        keep_partial: Whether a request of which samples are finished ends in these; their `left_out` says which are missing.
    """
    asked = AbortRequest(request_id=request_id, keep_partial=keep_partial)
    return post(ABORT_ROUTE, asked, lambda *answer: _ABORTED(*answer).num_aborted)


def post_object(_: WireFormat, path: str, body: Mapping[str, Any] | Request, /) -> Call[dict[str, Any]]:
    """Posts to a route that has no method of its own, and returns the object that the server answers with.

    Args:
        path: The path below the server's URL, e.g. "/pause_generation".
        body: The fields of the body.

    Raises:
        InvalidRequestError: The body holds a value that JSON cannot represent, or the server refuses a field.
        FlowrollError: The server raised any other error.
    """
    return Call(method="POST", path=path, read=read_object, content=encoded(body))


def health(_: WireFormat, /) -> Call[dict[str, Any]]:
    """Returns the answer of GET /health; raises an error if the server is not healthy."""
    return Call(method="GET", path="/health", read=read_object)


def server_info(_: WireFormat, /) -> Call[dict[str, Any]]:
    """Returns the model that is served, the limits and the versions."""
    return Call(method="GET", path="/server_info", read=read_object)


def models(_: WireFormat, /) -> Call[list[dict[str, Any]]]:
    """Returns the entries of GET /v1/models."""
    return Call(method="GET", path="/v1/models", read=_read_models)


def metrics(_: WireFormat, /) -> Call[str]:
    """Returns the Prometheus metrics as text."""
    return Call(method="GET", path="/metrics", read=_read_text, accept="text/plain")


def wait_ready(_: WireFormat, /, timeout_s: Number = DEFAULT_TIMEOUT_S) -> Steps[None]:
    """Waits until the server takes requests.

    Raises:
        ServerConnectionError: The server is not ready within `timeout_s` seconds; the message says why.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        # A server that does not answer at all is not waited for.
        patience_s = min(max(deadline_s - time.monotonic(), 0.1), _PROBE_TIMEOUT_S)
        try:
            yield Call(method="GET", path="/readiness", read=read_object, timeout_s=patience_s)
            return
        except (ServerConnectionError, ShuttingDownError) as error:
            if time.monotonic() + _READY_POLL_S > deadline_s:
                raise ServerConnectionError(
                    f"the server must be ready within {timeout_s:g} s, got ({error}); look at its log, or wait longer for a "
                    "large model."
                ) from error
        yield _READY_POLL_S


def _sampling(
    kind: type[Request],
    path: str,
    given: Mapping[str, Any],
    wire_format: WireFormat,
    decode: Callable[[bytearray, str], list[SampleT]],
) -> Call[list[SampleT]]:
    content, content_type = _request_body(kind, given, wire_format)

    def read(answer: bytearray, answer_type: str) -> list[SampleT]:
        samples = decode(answer, answer_type)
        check_answers(samples, given)
        return samples

    return Call(
        method="POST",
        path=path,
        read=read,
        accept=_ACCEPT[wire_format],
        content=content,
        content_type=content_type,
        max_bytes=None,
        image_steps=_image_steps(given),
    )


def _image_steps(given: Mapping[str, Any]) -> int:
    """Returns the number of denoising steps that a request asks for, over all of its samples; a fork counts as its leaves."""
    sigmas, steps = given.get("sigmas"), given.get("num_inference_steps")
    taken = len(sigmas) - 1 if sigmas is not None else steps or _USUAL_STEPS
    samples = count_samples(given) * count_leaves(tuple(dict(given.get("fork") or {}).items()))
    return int(taken) * samples


def _request_body(kind: type[Request], given: Mapping[str, Any], wire_format: WireFormat) -> tuple[bytes, str]:
    """Returns the body of a request and its media type.

    It has only the fields that were given, so that the server's defaults apply to all others. Without tensors and images it is
    JSON, which is easy to look at.
    """
    nested = nested_request(kind, EXTRA)
    assert nested is not None
    inside = set(nested.__struct_fields__) - set(kind.__struct_fields__)
    if (images := checked_images(given.get("images"))) is not None:
        given = {**given, "images": images}
    if fork := given.get("fork"):
        given = {**given, "fork": {str(step): children for step, children in dict(fork).items()}}
    sent: dict[str, Any] = {name: value for name, value in given.items() if name not in inside}
    if further := {name: value for name, value in given.items() if name in inside}:
        sent[EXTRA] = further
    if images is None and not any(isinstance(value, Tensor) for value in given.values()):
        return encoded(sent), JSON
    body = encode(sent, wire_format)
    return b"".join(body.chunks()), body.content_type


def _read_models(body: bytearray, content_type: str) -> list[dict[str, Any]]:
    found = read_object(body, content_type).get("data")
    if not isinstance(found, list):
        raise ServerConnectionError(f"the answer must list models in data, got {excerpt(body)}; check the URL.")
    return found


def _read_text(body: bytearray, content_type: str) -> str:
    return body.decode(errors="replace")
