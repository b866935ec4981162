"""What a fleet says of itself: its replicas, and what has happened to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """A replica, as /replicas shows it.

    Attributes:
        id: Its id; a replica that replaces another one has a new id.
        state: "starting", "ready" or "draining".
        weight_version: The version of its weights; None while it starts.
        version_number: The number of this version in the fleet's sequence; None while it starts.
        image_steps: The denoising steps that it has yet to take.
        num_requests: The requests, or parts of requests, that it has not answered.
        node: The id of its node in Ray.
        pid: The process id of its rank 0.
        uptime_s: Seconds since it was started.
    """

    id: str
    state: str
    weight_version: str | None
    version_number: int | None
    image_steps: int
    num_requests: int
    node: str
    pid: int | None
    uptime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetInfo:
    """The replicas of a fleet, and what has happened to them.

    Attributes:
        weight_version: The newest version of the weights.
        version_number: Its number in the fleet's sequence.
        replicas: The replicas that are there.
        num_lost: The number of replicas that have ended and were, or will be, replaced.
        num_retried: The number of requests, or parts of requests, that were run again because their replica ended.
        num_split: The number of requests that were run by several replicas.
    """

    weight_version: str
    version_number: int
    replicas: tuple[ReplicaInfo, ...]
    num_lost: int
    num_retried: int
    num_split: int
