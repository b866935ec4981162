"""What an answer looks like: media type and dialect, chosen from the request's headers and the server's defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from starlette.datastructures import Headers

from flowroll.errors import InvalidRequestError
from flowroll.serving.config import ServerConfig
from flowroll.wire.codec import JSON, MSGPACK, WireFormat
from flowroll.wire.messages import Dialect

PNG = "image/png"
DIALECT_HEADER = "x-flowroll-dialect"
DEADLINE_HEADER = "x-flowroll-deadline-s"

WIRE_FORMATS: Mapping[str, WireFormat] = {JSON: "json", MSGPACK: "msgpack"}
_NOT_ACCEPTABLE = 0.0


class NotAcceptableError(InvalidRequestError):
    """The request accepts none of the media types that the route has; an `InvalidRequestError` to the client."""

    status = 406


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """One entry of an Accept header, e.g. `image/*;q=0.5`."""

    kind: str
    subtype: str
    quality: float

    @property
    def specificity(self) -> int:
        return (self.kind != "*") + (self.subtype != "*")

    def matches(self, media_type: str) -> bool:
        kind, _, subtype = media_type.partition("/")
        return self.kind in ("*", kind) and self.subtype in ("*", subtype)


def choose_media_type(headers: Headers, offers: Sequence[str]) -> str:
    """Returns the offered media type that the Accept header likes best.

    By quality; then a type that is named over one that a wildcard covers; then in the order of the offers.

    Args:
        headers: The headers of the request; no Accept header means anything.
        offers: What the route can answer, its default first.

    Raises:
        NotAcceptableError: None of them is accepted.
    """
    accept = ",".join(headers.getlist("accept"))
    if not accept.strip():
        return offers[0]
    ranges = [_parse_range(entry) for entry in accept.split(",") if entry.strip()]
    ranked = [(*_score(offer, ranges), -order) for order, offer in enumerate(offers)]
    best = max(ranked)
    if best[0] == _NOT_ACCEPTABLE:
        raise NotAcceptableError(
            f"accept must allow {' or '.join(offers)}, got {accept[:80]}; leave it out for {offers[0]}.", field="accept"
        )
    return offers[-best[-1]]


def choose_wire_format(headers: Headers, config: ServerConfig) -> WireFormat:
    """Returns the format of the rollouts in the answer.

    Raises:
        NotAcceptableError: The request accepts neither.
    """
    return WIRE_FORMATS[choose_media_type(headers, wire_media_types(config))]


def wire_media_types(config: ServerConfig) -> list[str]:
    """Returns the media types of the wire formats, the server's default first."""
    return sorted(WIRE_FORMATS, key=lambda media_type: WIRE_FORMATS[media_type] != config.wire_format)


def choose_dialect(headers: Headers, config: ServerConfig) -> Dialect:
    """Returns the names in the answer.

    Raises:
        InvalidRequestError: The header names no dialect.
    """
    asked = headers.get(DIALECT_HEADER)
    if asked is None:
        return config.wire_dialect
    known = get_args(Dialect)
    if asked in known:
        return cast(Dialect, asked)
    raise InvalidRequestError(
        f"{DIALECT_HEADER} must be {' or '.join(known)}, got {asked[:80]!r}; leave the header out for {config.wire_dialect}.",
        field=DIALECT_HEADER,
    )


def choose_deadline_s(headers: Headers) -> float | None:
    """Seconds from now after which the request is given up; None: never.

    Raises:
        InvalidRequestError: The header is no number of seconds.
    """
    asked = headers.get(DEADLINE_HEADER)
    if asked is None:
        return None
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and seconds > 0:
        return seconds
    raise InvalidRequestError(
        f"{DEADLINE_HEADER} must be a number of seconds > 0, got {asked[:80]!r}; leave it out for no deadline.",
        field=DEADLINE_HEADER,
    )


def _parse_range(entry: str) -> _Range:
    media_range, *parameters = entry.split(";")
    kind, _, subtype = media_range.strip().lower().partition("/")
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            quality = _parse_quality(value.strip())
    return _Range(kind=kind, subtype=subtype, quality=quality)


def _parse_quality(text: str) -> float:
    """Returns a quality in [0, 1]; what is no number counts as a refusal."""
    try:
        quality = float(text)
    except ValueError:
        return _NOT_ACCEPTABLE
    return quality if 0 <= quality <= 1 else _NOT_ACCEPTABLE


def _score(offer: str, ranges: Sequence[_Range]) -> tuple[float, int]:
    """Returns quality and specificity of the most specific range that covers the offer."""
    covering = [(entry.specificity, entry.quality) for entry in ranges if entry.matches(offer)]
    if not covering:
        return _NOT_ACCEPTABLE, 0
    specificity, quality = max(covering)
    return quality, specificity
