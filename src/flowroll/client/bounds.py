"""What an answer may cost the client: its bytes, its time, and whether it is the answer to what was asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from flowroll.errors import ServerConnectionError
from flowroll.types import GeneratedImage, Rollout
from flowroll.types.forks import count_leaves
from flowroll.types.starts import count_samples

SampleT = TypeVar("SampleT", Rollout, GeneratedImage)
# Of an answer that is a JSON object: a few lines, or the names of all tensors of a model.
MAX_OBJECT_BYTES = 64 * 2**20
# As much as a server makes by default, in base64, with the environments that its own limit does not count.
MAX_ANSWER_BYTES = 32 * 2**30
_MAX_SHOWN_CHARS = 80


class Deadline:
    """The moment at which a call must be over.

    Args:
        seconds: Seconds from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """The seconds until then, at least a thousandth."""
        return max(self._end_s - time.monotonic(), 0.001)

    def check(self) -> None:
        """Refuses to go on once it has passed.

        Raises:
            ServerConnectionError: It has.
        """
        if time.monotonic() > self._end_s:
            raise self.passed()

    def passed(self) -> ServerConnectionError:
        """Makes the error of a call that is not over."""
        return ServerConnectionError(
            f"the call must be over within {self.seconds:g} s, got no end of it; ask for less at a time, or raise "
            "total_timeout_s."
        )

    def bounded(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the pieces of a request's body until the deadline."""
        for piece in pieces:
            self.check()
            yield piece


class AnswerBody:
    """Collects the body of an answer as it comes, and refuses what is too large or takes too long.

    Args:
        response: The answer, of which the headers are here.
        max_bytes: The most bytes of the body.
        deadline: When all of it must be there.

    Attributes:
        data: What has come.

    Raises:
        ServerConnectionError: The answer is compressed, which nobody asked for, or says that it is too large.
    """

    def __init__(self, response: httpx.Response, *, max_bytes: int, deadline: Deadline) -> None:
        self.data = bytearray()
        self._max_bytes, self._deadline = max_bytes, deadline
        # A few bytes can unpack to as many gigabytes.
        if (coding := response.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
            raise ServerConnectionError(
                f"the answer must not be compressed, got content-encoding {coding[:_MAX_SHOWN_CHARS]!r}; look at the proxy in "
                "between."
            )
        declared = response.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
            raise self._too_large(declared[:20])

    def add(self, piece: bytes) -> None:
        """Takes the next piece.

        Raises:
            ServerConnectionError: It is too much, or too late.
        """
        self._deadline.check()
        if len(self.data) + len(piece) > self._max_bytes:
            raise self._too_large("more")
        self.data += piece

    def _too_large(self, got: str) -> ServerConnectionError:
        return ServerConnectionError(
            f"the answer must have at most {self._max_bytes} bytes, got {got}; ask for less at a time, or raise "
            "max_answer_bytes."
        )


def check_answers(samples: Sequence[SampleT], asked: Mapping[str, Any]) -> None:
    """Compares the samples of an answer with the request that they should answer.

    Args:
        samples: The answer.
        asked: The fields of the request that were sent.

    Raises:
        ServerConnectionError: They are those of another request.
    """
    leaves = count_leaves(tuple(dict(asked.get("fork") or {}).items()))
    count = count_samples(asked)
    seeds = asked.get("seeds")
    if seeds is None and asked.get("seed") is not None:
        seeds = range(asked["seed"], asked["seed"] + count)
    expected = {
        "request_id": None if asked.get("request_id") is None else {asked["request_id"]},
        "prompt": {asked.get("prompt")},
    }
    # An abort may have left samples out, which all others say.
    left_out = set(samples[0].left_out) if samples else set()
    kept = [place for place in range(count * leaves) if place not in left_out]
    _require("number of samples", len(samples), len(kept))
    _require("samples that are left out", {sample.left_out for sample in samples}, {tuple(sorted(left_out))})
    if seeds is not None:
        _require("seeds", [sample.seed for sample in samples], [seeds[place // leaves] for place in kept])
    for name, wanted in expected.items():
        found = {getattr(sample, name) for sample in samples}
        _require(name, found, wanted if wanted is not None else set(list(found)[:1]))


def _require(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ServerConnectionError(
            f"the answer must have the {name} that was asked for, {str(expected)[:_MAX_SHOWN_CHARS]}, got "
            f"{str(found)[:_MAX_SHOWN_CHARS]}; it is another request's: look at the proxy in between, and retry."
        )
