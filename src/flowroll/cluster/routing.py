"""Which replica runs what: least outstanding work, groups kept together, versions that are new enough.

This module knows nothing of Ray, and does no input or output. One thread owns a `Router`: the fleet's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from flowroll.engine.weights.versions import WeightVersions, too_stale
from flowroll.errors import FlowrollError, OutdatedWeightsError, QueueFullError

# When a fleet without a replica that is ready is worth asking again, in seconds.
_NONE_READY_RETRY_S = 5.0


@dataclass(slots=True, kw_only=True)
class ReplicaLoad:
    """A replica that takes requests, as the router sees it.

    Attributes:
        id: The id of the replica.
        version: The name of the version of its weights.
        number: The number of this version in the fleet's sequence.
        image_steps: The denoising steps that it has yet to take, over all samples that it was given.
        num_requests: The number of requests, or parts of requests, that it has not answered.
        last_turn: When it was last given something, as a count of turns.
    """

    id: str
    version: str
    number: int
    image_steps: int = 0
    num_requests: int = 0
    last_turn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The samples of a request that one replica runs.

    Attributes:
        replica: The id of the replica.
        samples: The places of the samples among those of the request.
        image_steps: The denoising steps of these samples together.
    """

    replica: str
    samples: range
    image_steps: int


class Router:
    """Gives requests to replicas. A request is given to the replica with the fewest outstanding image-steps.

    Args:
        versions: The versions of the fleet's weights.
        max_batch_samples: The number of samples in one forward of a replica. A group that is not larger stays together, since
            its samples share their conditioning and their forwards; a larger one is split into parts of this size at most, as
            far as there are replicas. Seeds are those of the samples, wherever they run.
        max_staleness: The number of versions by which a replica's weights may be older than the newest; an older replica is
            given nothing until it has caught up. None: there is no bound.
    """

    def __init__(self, versions: WeightVersions, *, max_batch_samples: int, max_staleness: int | None = None) -> None:
        self.versions = versions
        self._max_batch_samples, self._max_staleness = max_batch_samples, max_staleness
        self._replicas: dict[str, ReplicaLoad] = {}
        self._leaving: dict[str, ReplicaLoad] = {}
        self._turn = 0

    def join(self, replica: str, *, version: str, number: int) -> None:
        """Lets a replica take requests from now on."""
        assert replica not in self._replicas
        self._replicas[replica] = ReplicaLoad(id=replica, version=version, number=number)

    def leave(self, replica: str) -> None:
        """Gives a replica no more requests. What it still runs is released as ever. It may be called twice."""
        self._replicas.pop(replica, None)
        self._leaving.pop(replica, None)

    def drain(self, replica: str) -> ReplicaLoad | None:
        """Gives a replica no more requests, and returns its load, which goes on to be counted; None: it takes none already."""
        if (found := self._replicas.pop(replica, None)) is not None:
            self._leaving[replica] = found
        return found

    def set_version(self, replica: str, version: str, number: int) -> None:
        """Notes that a replica has other weights."""
        if (found := self._replicas.get(replica)) is not None:
            found.version, found.number = version, number

    @property
    def replicas(self) -> Sequence[ReplicaLoad]:
        """The replicas that take requests."""
        return tuple(self._replicas.values())

    @property
    def newest(self) -> int:
        """The number of the newest version that a replica has, or that the fleet has had."""
        return max([self.versions.state.newest, *(one.number for one in self._replicas.values())])

    def eligible(
        self, minimum: str | None = None, *, max_staleness: int | None = None, but: Collection[str] = ()
    ) -> list[ReplicaLoad]:
        """Returns the replicas that may run a request, the least busy one first.

        Args:
            minimum: The version that the weights must have at least.
            max_staleness: The number of versions by which they may be behind the newest, beside the fleet's own bound.
            but: The replicas that have been asked in vain.

        Raises:
            QueueFullError: No replica takes requests at the moment.
            OutdatedWeightsError: The weights of all replicas are older than the one or the other.
        """
        if not self._replicas:
            raise QueueFullError(
                f"a replica must be ready to take requests, got none at the moment; try again in {_NONE_READY_RETRY_S:g} s.",
                retry_after_s=_NONE_READY_RETRY_S,
            )
        best, newest = max(self._replicas.values(), key=lambda one: one.number), self.newest
        bounds = [most for most in (self._max_staleness, max_staleness) if most is not None]
        if bounds and newest - best.number > min(bounds):
            raise too_stale(best.version, newest - best.number, min(bounds))
        recent = [one for one in self._replicas.values() if not bounds or newest - one.number <= min(bounds)]
        enough = [one for one in recent if self.versions.state.is_enough(one.version, one.number, minimum)]
        if not enough:
            raise OutdatedWeightsError(
                f"the weights must be of version {minimum} or later, got {best.version}; update them first, or ask again "
                "later.",
                field="min_weight_version",
            )
        return sorted((one for one in enough if one.id not in but), key=lambda one: (one.image_steps, one.last_turn))

    def place(
        self,
        num_samples: int,
        image_steps: int,
        *,
        minimum: str | None = None,
        max_staleness: int | None = None,
        max_parts: int | None = None,
        but: Collection[str] = (),
    ) -> list[Part]:
        """Gives the samples of a request to replicas. Each part has to be given back to `release`.

        Args:
            num_samples: The number of samples that are started.
            image_steps: The number of denoising steps of all of them together.
            minimum: The version that the weights must have at least.
            max_staleness: The number of versions by which they may be behind the newest.
            max_parts: The most parts; None: as many as there are batches.
            but: The replicas that have been asked in vain.

        Returns:
            The parts in the order of the samples; none, if every replica has been asked.

        Raises:
            QueueFullError: No replica takes requests at the moment.
            OutdatedWeightsError: The weights of all replicas are older.
        """
        places = self.eligible(minimum, max_staleness=max_staleness, but=but)
        num_parts = min(-(-num_samples // self._max_batch_samples), len(places), max_parts or len(places))
        parts = []
        for index in range(num_parts):
            samples = range(num_samples * index // num_parts, num_samples * (index + 1) // num_parts)
            steps = image_steps * len(samples) // num_samples
            parts.append(Part(replica=places[index].id, samples=samples, image_steps=steps))
            self._take(places[index], steps)
        return parts

    def release(self, part: Part) -> None:
        """Notes that a part has ended, in whatever way."""
        if (found := self._replicas.get(part.replica) or self._leaving.get(part.replica)) is not None:
            found.image_steps = max(found.image_steps - part.image_steps, 0)
            found.num_requests = max(found.num_requests - 1, 0)

    def _take(self, replica: ReplicaLoad, image_steps: int) -> None:
        self._turn += 1
        replica.last_turn = self._turn
        replica.image_steps += image_steps
        replica.num_requests += 1


def soonest(errors: Iterable[FlowrollError]) -> FlowrollError:
    """Returns the error of a request that no replica takes: of full queues the one with the soonest Retry-After."""
    found = list(errors)
    full = [error for error in found if isinstance(error, QueueFullError)]
    return min(full, key=lambda error: error.retry_after_s) if full else found[0]
