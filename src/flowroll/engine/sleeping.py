"""An engine's sleep: the memory of its weights, given to others for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from flowroll.engine.core import EngineCore
from flowroll.engine.weights.offload import SleepMode
from flowroll.types import MemoryChange


class SleepingEngine(EngineCore):
    """The part of `Engine` that sleeps and wakes; rest.py moves the weights."""

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of the weights is released."""
        return self._offload.mode is not None

    @property
    def memory_mode(self) -> SleepMode | None:
        """Where the weights are kept while their memory is released; None: they are in place."""
        return self._offload.mode

    def sleep(self, mode: SleepMode = "offload") -> MemoryChange:
        """Releases the memory of all weights and adapters, on every rank, once the requests that run have finished.

        Until `wake`, whatever needs weights, requests that wait already included, ends in an `AsleepError`; also updates and
        checksums. An engine that sleeps already goes on as it does.

        Args:
            mode: "offload": weights of a GPU go to pinned memory of the host; those of a CPU stay, and nothing is released.
                "disk": they go to a file without a name in the folder for temporary files (TMPDIR).

        Raises:
            EngineError: There is no room there, on some rank. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """

        def release() -> int:
            if self.is_asleep:
                return 0
            take = self._offload.prepare_release(mode)
            self._executor.stage_release(mode)
            self._executor.commit()
            return take()

        return self._timed(release)

    def wake(self) -> MemoryChange:
        """Brings the weights back, bit for bit; one that does not sleep stays as it is.

        Raises:
            EngineError: There is no memory for them, or the disk fails, on some rank. The engine sleeps on.
            ShuttingDownError: The engine was interrupted or closed.
        """

        def resume() -> int:
            if not self.is_asleep:
                return 0
            take = self._offload.prepare_resume()
            self._executor.stage_resume()
            self._executor.commit()
            return take()

        return self._timed(resume)

    def _timed(self, action: Callable[[], int]) -> MemoryChange:
        def run() -> MemoryChange:
            started_s = time.perf_counter()
            num_bytes = action()
            seconds = time.perf_counter() - started_s
            return MemoryChange(mode=self._offload.mode, num_bytes=num_bytes, seconds=seconds)

        return self._alone(run)
