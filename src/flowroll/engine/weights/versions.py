"""The versions of weights: their names, and the integer sequence beside them, by which their age is told.

Each version has a name, which a trainer may choose, and a number, which is counted: 0, 1, 2, ... A version is the newer one if
its number is higher. Of a demanded version only the name is known: two names that are numbers are compared as numbers, any
others by the sequence. An engine and a fleet of engines count alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowroll.errors import OutdatedWeightsError
from flowroll.types import check_version, version_number

# How many versions are remembered by name; a request that demands an older one by a name that is no number is refused.
MAX_NAMES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """The version of some weights, and those that there were.

    Attributes:
        current: The name of the version of the weights.
        number: Its number.
        newest: The highest number so far. It is `number`, unless a fleet was started again and has not got its weights back.
        highest: The highest number that was the name of a version.
        numbers: The number of each version by its name, in the order of their arrival; the newest `MAX_NAMES`.
    """

    current: str
    number: int
    newest: int
    highest: int
    numbers: Mapping[str, int]

    @classmethod
    def first(cls, name: str = "0") -> VersionState:
        """Returns the state of weights that were just loaded from a checkpoint."""
        return cls(current=name, number=0, newest=0, highest=version_number(name) or 0, numbers={name: 0})

    def after(self, name: str) -> VersionState:
        """Returns the state once `name` is the newest version. A name that is the current one already keeps its number."""
        number = self.number if name == self.current and self.number == self.newest else self.newest + 1
        numbers = {other: count for other, count in self.numbers.items() if other != name}
        numbers[name] = number
        if len(numbers) > MAX_NAMES:
            del numbers[next(iter(numbers))]
        highest = max(self.highest, version_number(name) or 0)
        return VersionState(current=name, number=number, newest=number, highest=highest, numbers=numbers)

    def following(self, given: str | None) -> str:
        """Returns the version of the next weights: the given one, or, if that is None, one more than the highest number so far.

        Raises:
            InvalidRequestError: The given text is not a valid version.
        """
        if given is None:
            return str(self.highest + 1)
        check_version(given, "weight_version")
        return given

    def number_of(self, name: str) -> int:
        """Returns the number of a version by its name; -1 if it is not remembered."""
        return self.number if name == self.current else self.numbers.get(name, -1)

    def is_enough(self, name: str, number: int, minimum: str | None) -> bool:
        """Tells whether weights are of the version `minimum` or a later one.

        Args:
            name: The name of the version of the weights.
            number: Its number.
            minimum: The name of the version that is demanded; None: any version will do.
        """
        if minimum is None or minimum == name:
            return True
        wanted, have = version_number(minimum), version_number(name)
        if wanted is not None and have is not None:
            return have >= wanted
        return (arrived := self.numbers.get(minimum)) is not None and arrived <= number


class WeightVersions:
    """The versions of an engine's weights. Only one thread may write; any thread may read.

    Attributes:
        state: The version now, and those that there were.
    """

    def __init__(self, state: VersionState | None = None) -> None:
        self.state = state or VersionState.first()

    @property
    def current(self) -> str:
        """The name of the version of the weights."""
        return self.state.current

    def advance(self, version: str) -> None:
        """Makes `version` the current version."""
        self.adopt(self.state.after(version))

    def adopt(self, state: VersionState) -> None:
        """Puts a state into effect. It cannot fail."""
        self.state = state

    def demand(self, minimum: str | None) -> None:
        """Refuses to run on weights that are older than `minimum`.

        Raises:
            OutdatedWeightsError: The current weights are older.
        """
        state = self.state
        if not state.is_enough(state.current, state.number, minimum):
            raise OutdatedWeightsError(
                f"the weights must be of version {minimum} or later, got {state.current}; update them first, or ask again "
                "later.",
                field="min_weight_version",
            )

    def demand_recent(self, version: str, most: int | None, *, coming: int = 0) -> None:
        """Refuses to run, or to go on, on weights that are older than a request allows.

        Args:
            version: The name of the version that the request runs on.
            most: The number of versions by which it may be behind the newest one; None: any.
            coming: The number of newer versions that are ready and wait for running requests to end.

        Raises:
            OutdatedWeightsError: They are older.
        """
        if most is None:
            return
        state = self.state
        if (behind := state.newest + coming - state.number_of(version)) > most:
            raise too_stale(version, behind, most)


def too_stale(version: str, behind: int, most: int) -> OutdatedWeightsError:
    """Makes the error of a request whose weights are too many versions behind."""
    return OutdatedWeightsError(
        f"the weights must be at most {most} versions behind the newest, got version {version}, which is {behind} behind; ask "
        "again once newer weights are in place, or allow more.",
        field="max_staleness",
    )
