"""The update whose tensors arrive over HTTP: there is at most one, since it needs memory for a second set of weights.

Everything here is called on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from flowroll.engine import Engine
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.errors import NotFoundError, WeightsBusyError

_log = logging.getLogger(__name__)


class OpenUpdate:
    """An update that was begun and not yet ended.

    Attributes:
        update_id: Names it.
        incoming: What has arrived.
        weight_version: Of the new weights; None: counted.
        last_s: When somebody last sent something, by the loop's clock.
        is_committing: Whether it waits for its commit.
        fills: Buckets that are filled just now by what has a patience of its own.
    """

    def __init__(self, incoming: WeightReceiver, weight_version: str | None) -> None:
        self.update_id = secrets.token_hex(8)
        self.incoming, self.weight_version = incoming, weight_version
        self.is_committing = False
        self.fills = 0
        self.touch()

    def touch(self) -> None:
        """Somebody has sent something."""
        self.last_s = asyncio.get_running_loop().time()


class WeightUpdates:
    """See the module.

    Args:
        engine: Whose weights they are.
        idle_s: Seconds of silence after which an update is dropped.
    """

    def __init__(self, engine: Engine, *, idle_s: float) -> None:
        self._engine, self.idle_s = engine, idle_s
        self._arrival: OpenUpdate | None = None

    def begin(self, module: str, weight_version: str | None, *, partial: bool = False) -> OpenUpdate:
        """Makes room for an update.

        Raises:
            WeightsBusyError: Another one is under way.
        """
        self.check_none()
        incoming = self._engine.receive_weights(module, partial=partial)
        self._arrival = OpenUpdate(incoming, weight_version)
        self._watch(self._arrival)
        return self._arrival

    def check_none(self) -> None:
        """Refuses to go on while an update is under way.

        Raises:
            WeightsBusyError: One is.
        """
        if (other := self._arrival) is not None:
            raise WeightsBusyError(
                f"one update of weights must end before another begins, got {other.update_id} under way; commit it, abort it, "
                f"or wait until it was silent for {self.idle_s:g} s."
            )

    def get(self, update_id: str) -> OpenUpdate:
        """The update of this id.

        Raises:
            NotFoundError: It has ended, or there never was one.
        """
        if self._arrival is None or self._arrival.update_id != update_id:
            raise NotFoundError(
                f"update_id must be of an update that is under way, got {update_id[:80]}; it was committed, aborted or dropped "
                "after a silence: begin another.",
                field="update_id",
            )
        return self._arrival

    def abandon(self, update_id: str) -> None:
        """Drops the update of this id.

        Raises:
            NotFoundError: It has ended, or there never was one.
            WeightsBusyError: It is committing; what was promised to that request cannot be taken back.
        """
        arrival = self.get(update_id)
        if arrival.is_committing:
            raise WeightsBusyError(
                "an update must not be committing to be dropped, got a commit under way; wait for its answer."
            )
        self.end(arrival)

    def end(self, arrival: OpenUpdate) -> None:
        """Forgets an update; what it holds goes, unless it was staged. May be called twice."""
        if self._arrival is arrival:
            self._arrival = None
        arrival.incoming.drop()

    def _watch(self, arrival: OpenUpdate) -> None:
        """Drops the update once it was silent for too long."""
        if self._arrival is not arrival:
            return
        loop = asyncio.get_running_loop()
        rest_s = self.idle_s if arrival.is_committing or arrival.fills else arrival.last_s + self.idle_s - loop.time()
        if rest_s > 0:
            loop.call_later(rest_s, self._watch, arrival)
            return
        _log.warning("update %s was silent for %g s and is dropped; the weights stay", arrival.update_id, self.idle_s)
        self.end(arrival)
