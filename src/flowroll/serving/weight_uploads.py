"""Updates of weights whose tensors arrive over HTTP: one at a time, and none that is forgotten.

Everything here is called on the event loop.
"""

from __future__ import annotations

import asyncio
import logging

from flowroll.engine.service import EngineClient, EngineService, OpenedUpdate
from flowroll.errors import NotFoundError, WeightsBusyError

_log = logging.getLogger(__name__)


class WeightUpload:
    """An update that was begun and not yet ended.

    Attributes:
        opened: The update, as the engine has opened it.
        weight_version: Version of the new weights; None: counted.
        partial: Whether tensors that do not arrive stay as they are.
        last_s: When somebody last sent something, by the loop's clock.
        is_committing: Whether it waits for its commit.
        fills: Buckets that are filled just now by what has a patience of its own.
    """

    def __init__(self, opened: OpenedUpdate, weight_version: str | None, *, partial: bool) -> None:
        self.opened, self.weight_version, self.partial = opened, weight_version, partial
        self.is_committing = False
        self.fills = 0
        self.touch()

    @property
    def update_id(self) -> str:
        """The id that names it."""
        return self.opened.update_id

    def touch(self) -> None:
        """Notes that somebody has sent something."""
        self.last_s = asyncio.get_running_loop().time()


class WeightUploads:
    """The update whose tensors arrive, if there is one.

    Args:
        engine: Whose weights they are.
        idle_s: Seconds of silence after which an update is dropped.
    """

    def __init__(self, engine: EngineClient, *, idle_s: float) -> None:
        self._engine, self.idle_s = engine, idle_s
        self._upload: WeightUpload | None = None
        self._beginning = asyncio.Lock()

    async def begin(self, module: str, weight_version: str | None, *, partial: bool = False) -> WeightUpload:
        """Makes room for an update.

        Raises:
            WeightsBusyError: Another one is under way.
        """
        async with self._beginning:
            self.check_none()
            opened = await self._engine.call(EngineService.open_update, module, partial=partial)
            self._upload = WeightUpload(opened, weight_version, partial=partial)
        self._watch(self._upload)
        return self._upload

    def check_none(self) -> None:
        """Refuses to go on while an update is under way.

        Raises:
            WeightsBusyError: One is.
        """
        if (other := self._upload) is not None:
            raise WeightsBusyError(
                f"one update of weights must end before another begins, got {other.update_id} under way; commit it, abort it, "
                f"or wait until it was silent for {self.idle_s:g} s."
            )

    def get(self, update_id: str) -> WeightUpload:
        """Returns the update of this id.

        Raises:
            NotFoundError: It has ended, or there never was one.
        """
        if self._upload is None or self._upload.update_id != update_id:
            raise NotFoundError(
                f"update_id must be of an update that is under way, got {update_id[:80]}; it was committed, aborted or dropped "
                "after a silence: begin another.",
                field="update_id",
            )
        return self._upload

    def abandon(self, update_id: str) -> None:
        """Drops the update of this id.

        Raises:
            NotFoundError: It has ended, or there never was one.
            WeightsBusyError: It is committing; what was promised to that request cannot be taken back.
        """
        upload = self.get(update_id)
        if upload.is_committing:
            raise WeightsBusyError(
                "an update must not be committing to be dropped, got a commit under way; wait for its answer."
            )
        self.end(upload)

    def end(self, upload: WeightUpload) -> None:
        """Forgets an update; what it holds goes, unless it was committed. May be called twice."""
        if self._upload is upload:
            self._upload = None
        self._engine.call(EngineService.drop_update, upload.update_id)

    def _watch(self, upload: WeightUpload) -> None:
        """Drops the update once it was silent for too long."""
        if self._upload is not upload:
            return
        loop = asyncio.get_running_loop()
        rest_s = self.idle_s if upload.is_committing or upload.fills else upload.last_s + self.idle_s - loop.time()
        if rest_s > 0:
            loop.call_later(rest_s, self._watch, upload)
            return
        _log.warning("update %s was silent for %g s and is dropped; the weights stay", upload.update_id, self.idle_s)
        self.end(upload)
