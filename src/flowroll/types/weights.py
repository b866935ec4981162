"""The version names of a policy's weights, and the reports about their changes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowroll.errors import InvalidRequestError

# The parts of a checkpoint that have weights; not every checkpoint has all of them.
ModuleName: TypeAlias = Literal["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
MAX_VERSION_CHARS = 128
# A number as a counter writes it, without sign or leading zero.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A finished change of weights.

    Attributes:
        module: The module that was changed.
        weight_version: The version of the weights from now on.
        previous_version: The version before the change.
        num_tensors: The number of the module's tensors.
        num_bytes: The bytes of these tensors in memory on rank 0.
        read_s: The seconds that reading and checking took, while generation continued.
        paused_s: Seconds for which no request could run.
    """

    module: ModuleName
    weight_version: str
    previous_version: str
    num_tensors: int
    num_bytes: int
    read_s: float
    paused_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChange:
    """A release or a restoration of the memory of the weights.

    Attributes:
        mode: Where the weights are kept now, "offload" or "disk"; "discard": nowhere, also after a restoration, until an update
            brings them; None: they are in place.
        num_bytes: The bytes that were moved on rank 0.
        seconds: The seconds for which no request could run.
    """

    mode: Literal["offload", "disk", "discard"] | None
    num_bytes: int
    seconds: float


def version_number(version: str) -> int | None:
    """Returns a version as a number, if it is one as a counter writes it; otherwise None."""
    return int(version) if _INTEGER.fullmatch(version) else None


def check_version(version: object, field: str) -> None:
    """Refuses a value that cannot be the name of a version.

    Raises:
        InvalidRequestError: The version is not a text, is empty, too long, or not printable.
    """
    if isinstance(version, str) and 0 < len(version) <= MAX_VERSION_CHARS and version.isprintable():
        return
    shown = f"{len(version)} characters" if isinstance(version, str) else type(version).__name__
    raise InvalidRequestError(
        f"{field} must be printable text of 1 to {MAX_VERSION_CHARS} characters, got {shown}; use a number or a short name.",
        field=field,
    )
