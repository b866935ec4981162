"""The versions of the weights that an engine has and has had.

Two versions that are numbers are compared as numbers. Any others are compared by arrival: a version that this engine has ever
had is no newer than its current one, and a version that it never had is newer.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowroll.errors import OutdatedWeightsError
from flowroll.types import check_version, version_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """The state of `WeightVersions` after a change to another version.

    Attributes:
        current: The new current version.
        highest: The highest number of all versions so far, including this one.
        arrived: All versions so far, including this one.
    """

    current: str
    highest: int
    arrived: frozenset[str]


class WeightVersions:
    """The current version and all versions before it. Only one thread may write; any thread may read.

    Args:
        first: The version of the weights that the engine was started with.
    """

    def __init__(self, first: str = "0") -> None:
        self._arrived = frozenset({first})
        self._highest = version_number(first) or 0
        self.current = first

    def following(self, given: str | None) -> str:
        """Returns the version of the next weights: the given one, or, if that is None, one more than the highest number so far.

        Raises:
            InvalidRequestError: The given text is not a valid version.
        """
        if given is None:
            return str(self._highest + 1)
        check_version(given, "weight_version")
        return given

    def advance(self, version: str) -> None:
        """Makes `version` the current version."""
        self.adopt(self.advanced(version))

    def advanced(self, version: str) -> Advance:
        """Returns the change that makes `version` the current version, for `adopt`."""
        return Advance(
            current=version, highest=max(self._highest, version_number(version) or 0), arrived=self._arrived | {version}
        )

    def adopt(self, advance: Advance) -> None:
        """Puts the result of `advanced` into effect. It cannot fail."""
        self._arrived, self._highest, self.current = advance.arrived, advance.highest, advance.current

    def demand(self, minimum: str | None) -> None:
        """Refuses to run on weights that are older than `minimum`.

        Raises:
            OutdatedWeightsError: The current weights are older.
        """
        current = self.current
        if minimum is None or minimum == current:
            return
        wanted, have = version_number(minimum), version_number(current)
        both_are_numbers = wanted is not None and have is not None
        if have < wanted if both_are_numbers else minimum not in self._arrived:  # type: ignore[operator]  # as it says
            raise OutdatedWeightsError(
                f"the weights must be of version {minimum} or later, got {current}; update them first, or ask again later.",
                field="min_weight_version",
            )
