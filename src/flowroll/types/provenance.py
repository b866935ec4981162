"""What proves where a sample comes from: digests of its noise, the engine that made it, and when and by which weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Whether the engine has the bits of the promises, or is in the mode that is faster and has not.
Exactness: TypeAlias = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStamp:
    """When a step was taken, and by which weights.

    Attributes:
        weight_version: The name of the version of the weights.
        version_number: Its number in the sequence of all versions, counted from 0; of a fleet, in the sequence of the fleet.
        time_s: The time in seconds since 1970, by the clock of the engine's machine.
    """

    weight_version: str
    version_number: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What proves where a sample comes from, beside its record (sigmas, digests of the environment) and `weight_version`.

    The digests are the SHA-256 of a tensor's bytes, in hex, which a trainer that has the tensor computes with any library. They
    do not depend on what shared a forward with the sample, nor on the layout.

    Attributes:
        layout: How the transformer was distributed over ranks, e.g. "single" or "sp2xcfg2".
        strategy: How samples shared forwards: without a changed bit ("merged"), not at all ("alone"), or, of a fast engine
            alone, in an ordinary batch ("fast").
        versions: The versions of the libraries whose code the bits depend on, by name.
        compiled: The name of the kernels that torch made of the transformer's blocks (compiler, settings); None where they ran
            eagerly.
        certificate: The name of the certificate of the kernels that computed it, which /server_info shows: a digest of the
            device, the libraries' versions and torch's settings; None in records from before this field.
        start_sha256: The digest of the state before the first step that was run, x_T unless the request began later; None for
            an evaluation.
        noise_sha256: The digest of the noise of each of the T steps, float32; None at a step that drew none or was not run,
            and None as a whole for an evaluation.
        weights_sha256: The checksum of the transformer's weights, as /get_weights_checksum tells it; None for a policy that
            holds weights of its own, and for more than `Limits.max_hashed_bytes` unless somebody has asked since they changed.
        exactness: "exact", or "fast" for an engine whose samples need not have the bits that they have alone.
        fast_parts: What made it fast, e.g. ("batch", "attention=sage"); empty for an exact engine.
    """

    layout: str
    strategy: str
    versions: Mapping[str, str]
    compiled: str | None = None
    certificate: str | None = None
    start_sha256: str | None = None
    noise_sha256: tuple[str | None, ...] | None = None
    weights_sha256: str | None = None
    exactness: Exactness = "exact"
    fast_parts: tuple[str, ...] = ()
