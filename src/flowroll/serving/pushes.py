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

PushOutcome: TypeAlias = Literal["completed", "idle", "restarted", "replaced"]
_log = logging.getLogger(__name__)


class WeightPush:
    """A push of which a bucket has come and others are missing.

    Attributes:
        given_version: What its buckets say of their version.
        version: Of the weights since its first bucket; None: none is in place yet.
        expected: Names of all that belongs to it.
        arrived: Of these, what has come since it began.
        is_mixed: Whether a bucket is in place, of this push or of one before it that was not completed.
        last_s: When a bucket came last, by the loop's clock.
    """

    def __init__(self, given_version: str | None) -> None:
        self.given_version = given_version
        self.version: str | None = None
        self.expected: frozenset[str] = frozenset()
        self.arrived: frozenset[str] = frozenset()
        self.is_mixed = False
        self.last_s = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return self.arrived >= self.expected


class WeightPushes:
    """The incomplete pushes of one server, at most one for each thing that is pushed.

    Args:
        hold: Keeps new samples from starting, or lets them start again.
        count: Counts how a push ended.
        idle_s: Seconds of silence after which a push is given up and samples start again.

    Attributes:
        turn: Held by the one bucket that is being received or put in place.
    """

    def __init__(self, hold: Callable[[bool], None], count: Callable[[PushOutcome], None], *, idle_s: float) -> None:
        self._hold, self._count, self._idle_s = hold, count, idle_s
        self._open: dict[str, WeightPush] = {}
        self.turn = asyncio.Lock()

    @contextmanager
    def bucket(self, subject: str, given_version: str | None, names: Set[str], expected: Set[str]) -> Iterator[WeightPush]:
        """The block puts a bucket in place. If it raises, the bucket has not come; no sample starts meanwhile.

        A bucket continues the push of its subject. If it has another version, or a name that came already, its sender has begun
        again: then everything has to come once more.

        Args:
            subject: What is pushed, e.g. "transformer".
            given_version: What the bucket says of its version.
            names: What is in it.
            expected: All that belongs to a push of this subject.
        """
        push = self._join(subject, given_version, names)
        push.expected |= expected
        push.arrived |= names
        self._hold(True)
        try:
            yield push
            push.is_mixed = True
        except Exception:
            push.arrived -= names
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

    def replaced(self, subject: str) -> None:
        """All of it was replaced in another way, so nothing is mixed any more."""
        if subject in self._open:
            self._end(subject, "replaced")

    def _join(self, subject: str, given_version: str | None, names: Set[str]) -> WeightPush:
        push = self._open.get(subject)
        if push is None:
            push = self._open[subject] = WeightPush(given_version)
            push.last_s = asyncio.get_running_loop().time()
            self._watch(subject, push)
        elif push.given_version != given_version or push.arrived & names:
            _log.warning("a push of %s begins again; %d tensors of the one before stay in place", subject, len(push.arrived))
            self._count("restarted")
            push.given_version, push.version, push.arrived = given_version, None, frozenset()
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
        del self._open[subject]
        self._count(outcome)
        self._hold(bool(self._open))
