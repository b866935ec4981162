"""Which weights an engine has, and has had.

Versions compare so: two numbers as numbers; anything else by order of arrival, where whatever this engine has ever had counts
as no newer than what it has now. A name that never arrived is newer.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowroll.errors import OutdatedWeightsError
from flowroll.types import check_version, version_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """A step to another version.

    Attributes:
        current: The version.
        highest: The highest number so far, with it.
        arrived: All versions so far, with it.
    """

    current: str
    highest: int
    arrived: frozenset[str]


class WeightVersions:
    """The current version, and every one before it. One thread writes, any may read.

    Args:
        first: Of the weights that the engine was started with.
    """

    def __init__(self, first: str = "0") -> None:
        self._arrived = frozenset({first})
        self._highest = version_number(first) or 0
        self.current = first

    def following(self, given: str | None) -> str:
        """The version of the next weights: the given one, or one more than the highest number so far.

        Raises:
            InvalidRequestError: The given one cannot name a version.
        """
        if given is None:
            return str(self._highest + 1)
        check_version(given, "weight_version")
        return given

    def advance(self, version: str) -> None:
        """Makes it the current one."""
        self.adopt(self.advanced(version))

    def advanced(self, version: str) -> Advance:
        """What `adopt` needs to make it the current one."""
        return Advance(
            current=version, highest=max(self._highest, version_number(version) or 0), arrived=self._arrived | {version}
        )

    def adopt(self, advance: Advance) -> None:
        """Takes the result of `advanced`; cannot fail."""
        self._arrived, self._highest, self.current = advance.arrived, advance.highest, advance.current

    def demand(self, minimum: str | None) -> None:
        """Refuses to run on weights that are older than `minimum`.

        Raises:
            OutdatedWeightsError: They are.
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
