"""Pushes: new weights that come bucket by bucket, each of which is put in place before it is answered, as SGLang does it.

Between the buckets of a push the model has some new weights and some old ones. So that no sample is made of such a mixture,
none starts from the first bucket on until every tensor has come, or until the push was silent for too long. Everything here is
called on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Literal, TypeAlias

from flowroll.errors import WeightsBusyError

PushOutcome: TypeAlias = Literal["completed", "idle", "restarted", "replaced"]
_log = logging.getLogger(__name__)


class WeightPush:
    """A push: buckets of one version, of which none repeats a name.

    Attributes:
        given_version: What its buckets say of their version.
        version: The version of the weights since its first bucket; None: none is in place yet.
        expected: Names of all that belongs to it.
        arrived: The names of those that have come since it began.
        is_mixed: Whether a bucket is in place, of this push or of one before it that was not completed.
        outcome: How it ended; None: it has not.
        last_s: When a bucket came last, by the loop's clock.
    """

    def __init__(self, given_version: str | None, expected: frozenset[str]) -> None:
        self.given_version, self.expected = given_version, expected
        self.version: str | None = None
        self.arrived: frozenset[str] = frozenset()
        self.is_mixed = False
        self.outcome: PushOutcome | None = None
        self.last_s = asyncio.get_running_loop().time()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return self.arrived >= self.expected

    def is_continued_by(self, given_version: str | None, names: Set[str]) -> bool:
        """Returns whether a bucket belongs to this push; if not, its sender has begun another."""
        return self.given_version == given_version and not self.arrived & names


class WeightPushes:
    """The pushes of one server, at most one at a time for each thing that is pushed.

    Args:
        hold: Keeps new samples from starting, or lets them start again.
        count: Counts how a push ended.
        idle_s: Seconds of silence after which a push is given up and samples start again.

    Attributes:
        turn: Held by the one bucket that is being received or put in place.
    """

    def __init__(self, hold: Callable[[bool], object], count: Callable[[PushOutcome], None], *, idle_s: float) -> None:
        self._hold, self._count, self._idle_s = hold, count, idle_s
        # The last of each subject that has ended; and those that are incomplete.
        self._last: dict[str, WeightPush] = {}
        self._open: dict[str, WeightPush] = {}
        self.turn = asyncio.Lock()

    @contextmanager
    def bucket(
        self, subject: str, given_version: str | None, names: Set[str], expected: Set[str] | None = None
    ) -> Iterator[WeightPush]:
        """Lets a block put a bucket in place. If it raises, the bucket has not come; no sample starts meanwhile.

        A bucket continues the push of its subject. If it has another version, or a name that came already, its sender has begun
        again: then everything has to come once more.

        Args:
            subject: What is pushed, e.g. "transformer".
            given_version: What the bucket says of its version.
            names: What is in it.
            expected: All that belongs to a push of this subject. None: nobody knows; what the push before it held has to come
                again, and whatever else comes belongs to it too.
        """
        push = self._join(subject, given_version, names)
        before = push.expected, push.arrived
        push.expected |= names if expected is None else expected
        push.arrived |= names
        self._hold(True)
        try:
            yield push
            push.is_mixed = True
        except Exception:
            push.expected, push.arrived = before
            if not push.is_mixed:
                del self._open[subject]
            raise
        except BaseException:
            # The caller is gone, and what was begun may still be done.
            push.is_mixed = True
            raise
        finally:
            push.last_s = asyncio.get_running_loop().time()
            if push.is_mixed and push.is_complete:
                self._end(subject, "completed")
            self._hold(bool(self._open))

    def check_whole(self) -> None:
        """Refuses what would use some new weights and some old ones.

        Raises:
            WeightsBusyError: A push is incomplete.
        """
        for subject, push in self._open.items():
            if push.is_mixed:
                raise WeightsBusyError(
                    f"the weights must be whole, got a push of {subject} with {len(push.arrived)} of {len(push.expected)} "
                    "tensors; send the rest first, or ask again later."
                )

    def replaced(self, subject: str) -> None:
        """Ends the push, because all of the module was replaced or removed in another way."""
        if subject in self._open:
            self._end(subject, "replaced")
        self._last.pop(subject, None)

    def _join(self, subject: str, given_version: str | None, names: Set[str]) -> WeightPush:
        push = self._open.get(subject)
        if push is None:
            push = self._begin(subject, given_version, names)
        elif not push.is_continued_by(given_version, names):
            _log.warning("a push of %s begins again; %d tensors of the one before stay in place", subject, len(push.arrived))
            self._count("restarted")
            push.given_version, push.version, push.arrived = given_version, None, frozenset()
        return push

    def _begin(self, subject: str, given_version: str | None, names: Set[str]) -> WeightPush:
        last = self._last.get(subject)
        if last is not None and last.outcome == "completed" and last.is_continued_by(given_version, names):
            # It seemed to be complete, since nobody knew that this belongs to it.
            push = last
        else:
            push = WeightPush(given_version, frozenset() if last is None else last.arrived)
        self._open[subject] = push
        self._watch(subject, push)
        return push

    def _watch(self, subject: str, push: WeightPush) -> None:
        """Gives the push up once it was silent for too long."""
        if self._open.get(subject) is not push:
            return
        loop = asyncio.get_running_loop()
        rest_s = self._idle_s if self.turn.locked() else push.last_s + self._idle_s - loop.time()
        if rest_s > 0:
            loop.call_later(rest_s, self._watch, subject, push)
            return
        _log.warning(
            "a push of %s was silent for %g s with %d of %d tensors; samples start again, on new and old weights",
            *(subject, self._idle_s, len(push.arrived), len(push.expected)),
        )
        self._end(subject, "idle")

    def _end(self, subject: str, outcome: PushOutcome) -> None:
        push = self._last[subject] = self._open.pop(subject)
        if push.outcome is None:
            self._count(outcome)
        push.outcome = outcome
        self._hold(bool(self._open))
