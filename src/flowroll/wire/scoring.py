"""POST /rollout/score: recorded steps <-> bytes, and their scores <-> bytes.

A request carries its tensors as an answer of POST /rollout/generate does, in JSON or msgpack, so that a trainer can send the
parts of a rollout back as they came, in either dialect. Unlike an answer it is read strictly: an unknown name is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

import msgspec
from torch import Tensor

from flowroll.errors import InvalidRequestError, MalformedRequestError
from flowroll.sampling.transition import LogProbForm
from flowroll.types import (
    AdapterRecord,
    Branch,
    PolicyRecord,
    RecordedSteps,
    ReferenceImage,
    SampleScores,
    SamplingRecord,
    ScoreAnswer,
    ScoreParams,
)
from flowroll.types.rules import refuse
from flowroll.wire.body import EncodedBody
from flowroll.wire.codec import JSON, MSGPACK, Blob, Body, WireFormat, encode, load, media_type_of, reading
from flowroll.wire.dialects import LayoutError, conditioning_of, env_from_wire, env_to_wire
from flowroll.wire.messages import (
    Dialect,
    WireScoreAnswer,
    WireScoreRequest,
    WireSteps,
    WireTensor,
)
from flowroll.wire.received import HOW_TO_SEND, received_tensor
from flowroll.wire.safetensors import BlobError

_RECORD_FIELDS = tuple(field.name for field in fields(SamplingRecord))
# The fields of a record that are objects, or lists of objects, and the names that these may have.
_RECORD_PARTS = {
    name: tuple(field.name for field in fields(kind))
    for name, kind in {
        "lora": AdapterRecord,
        "policy": PolicyRecord,
        "log_prob": LogProbForm,
        "branches": Branch,
        "images": ReferenceImage,
    }.items()
}
_REMEDY = "see /openapi.json"
_REQUESTS: Mapping[str, Any] = {
    JSON: msgspec.json.Decoder(WireScoreRequest[WireTensor[bytearray]]),
    MSGPACK: msgspec.msgpack.Decoder(WireScoreRequest[WireTensor[memoryview]]),
}
_ANSWERS: Mapping[str, Any] = {
    JSON: msgspec.json.Decoder(WireScoreAnswer[Blob[bytearray]]),
    MSGPACK: msgspec.msgpack.Decoder(WireScoreAnswer[Blob[memoryview]]),
}


def encode_score_request(params: ScoreParams, *, wire_format: WireFormat, dialect: Dialect = "native") -> EncodedBody:
    """Returns the body of a request; it refers to the tensors of `params`."""
    samples = [
        WireSteps(
            steps=sample.steps,
            latents=sample.latents,
            next_latents=sample.next_latents,
            denoising_env=env_to_wire(sample.denoising_env, dialect, conditioning_of(sample.sampling), sample.sampling),
            sampling=msgspec.to_builtins(sample.sampling),
            sde_step_indices=sample.sde_step_indices,
        )
        for sample in params.samples
    ]
    request = {field.name: getattr(params, field.name) for field in fields(params)} | {"samples": samples}
    return encode(WireScoreRequest(**request), wire_format)


def decode_score_request(body: Body, media_type: str) -> ScoreParams:
    """Returns what a request asks for. The large tensors of a msgpack body that is a `bytearray` are views into it.

    Args:
        body: All of it.
        media_type: `JSON` or `MSGPACK`.

    Raises:
        MalformedRequestError: The body is not of that type.
        InvalidRequestError: A field is missing, unknown, or of another type; it is named with its place.
    """
    try:
        sent = _REQUESTS[media_type].decode(body)
    except msgspec.ValidationError as error:
        _raise_invalid("", error)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"body must be {media_type}, got {error}; send one object.") from error
    except RecursionError as error:
        raise MalformedRequestError(f"body must be {media_type}, got too many nested levels; send flat values.") from error
    samples = []
    for index, sample in enumerate(sent.samples):
        try:
            samples.append(_steps_of(sample))
        except InvalidRequestError as error:
            raise error.within(f"samples[{index}]") from None
    return ScoreParams(**msgspec.structs.asdict(sent) | {"samples": tuple(samples)})


def encode_score_answer(answer: ScoreAnswer, *, wire_format: WireFormat) -> EncodedBody:
    """Returns the body of an answer; it refers to the tensors of `answer`."""
    return encode(answer, wire_format)


def decode_score_answer(body: Body, content_type: str) -> ScoreAnswer:
    """Returns the scores of an answer; tensors as for `decode_rollouts`.

    Raises:
        ServerConnectionError: The body is truncated, or no such answer.
    """
    with reading("scores"):
        answer = _ANSWERS[media_type_of(content_type)].decode(body)
        samples: list[dict[str, Any]] = [
            {name: load(value) if isinstance(value, Blob) else value for name, value in msgspec.structs.asdict(sample).items()}
            for sample in answer.samples
        ]
        scores = tuple(SampleScores(**sample) for sample in samples)
    return ScoreAnswer(**msgspec.structs.asdict(answer) | {"samples": scores})


def _steps_of(sample: WireSteps[WireTensor[Any]]) -> RecordedSteps:
    record = _record(sample.sampling)
    try:
        env = env_from_wire(sample.denoising_env, _load, conditioning_of(record), record)
    except (BlobError, LayoutError) as error:
        refuse("denoising_env", "hold tensors and plain values", error, "use the env of the rollout")
    return RecordedSteps(
        steps=sample.steps,
        latents=_states(sample.latents, "latents"),
        next_latents=_states(sample.next_latents, "next_latents"),
        denoising_env=env,
        sampling=record,
        sde_step_indices=sample.sde_step_indices,
    )


def _record(sent: dict[str, Any]) -> SamplingRecord:
    parts = [
        (f"sampling.{name}", one, known)
        for name, known in _RECORD_PARTS.items()
        for one in (sent[name] if isinstance(sent.get(name), list) else [sent.get(name)])
        if isinstance(one, dict)
    ]
    for where, given, known in (("sampling", sent, _RECORD_FIELDS), *parts):
        for name in given:
            if name not in known:
                field = f"{where}.{str(name)[:80]}"
                refuse(field, "be a field of the record", "an unknown name", "use the record as it was sent")
    try:
        return msgspec.convert(sent, SamplingRecord)
    except msgspec.ValidationError as error:
        _raise_invalid("sampling", error)
    except AssertionError:
        rule = "hold num_inference_steps timesteps and one sigma more, and run some of these steps"
        refuse("sampling", rule, "other numbers of them", "use the record as it was sent")


def _states(sent: WireTensor[Any], field: str) -> Tensor:
    try:
        return _load(sent)
    except (BlobError, LayoutError) as error:
        refuse(field, "be a tensor", error, HOW_TO_SEND)


def _load(sent: object) -> Tensor:
    if not isinstance(sent, WireTensor):
        raise LayoutError(f"{type(sent).__name__} where a tensor should be")
    return received_tensor(sent)


def _raise_invalid(parent: str, error: msgspec.ValidationError) -> NoReturn:
    """Raises the error in our words, with its place."""
    words, _, place = str(error).partition(" - at `$")
    field = ".".join(part for part in (parent, place.rstrip("`").lstrip(".")) if part)
    if found := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", words, re.DOTALL):
        field = ".".join(part for part in (field, found[2][:80]) if part)
        missing = found[1].startswith("missing")
        rule, value = ("be given", "nothing") if missing else ("be a known field", "an unknown name")
    elif found := re.fullmatch(r"Expected `(.*?)`, got `(.*)`", words, re.DOTALL):
        rule, value = f"be of the type {found[1]}", found[2][:80]
    else:
        rule, value = "be valid", words[:200]
    refuse(field or "body", rule, value, _REMEDY)
