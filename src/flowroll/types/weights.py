"""What names the weights of a policy, and what is said of a change of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowroll.errors import InvalidRequestError

# The parts of a checkpoint that have weights; not every checkpoint has all of them.
ModuleName: TypeAlias = Literal["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
MAX_VERSION_CHARS = 128
# No sign, no leading zero: what a counter writes.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A finished change of weights.

    Attributes:
        module: What was changed.
        weight_version: The version from now on.
        previous_version: The one before.
        num_tensors: Tensors of the module.
        num_bytes: Of these tensors in memory, on rank 0.
        read_s: Seconds that reading and checking took, while generation went on.
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
    """Memory of weights that was released or taken again.

    Attributes:
        mode: Where the weights are kept now, "offload" or "disk"; None: they are in place.
        num_bytes: That moved, on rank 0.
        seconds: For which no request could run.
    """

    mode: Literal["offload", "disk"] | None
    num_bytes: int
    seconds: float


def version_number(version: str) -> int | None:
    """The number that a version is, if it is one as a counter writes it."""
    return int(version) if _INTEGER.fullmatch(version) else None


def check_version(version: object, field: str) -> None:
    """Refuses what cannot name a version.

    Raises:
        InvalidRequestError: It is no text, empty, too long, or not printable.
    """
    if isinstance(version, str) and 0 < len(version) <= MAX_VERSION_CHARS and version.isprintable():
        return
    shown = f"{len(version)} characters" if isinstance(version, str) else type(version).__name__
    raise InvalidRequestError(
        f"{field} must be printable text of 1 to {MAX_VERSION_CHARS} characters, got {shown}; use a number or a short name.",
        field=field,
    )
