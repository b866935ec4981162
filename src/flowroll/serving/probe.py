"""Whether the engine can generate: by what it did lately, by what it does now, or by trying."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Literal, TypeAlias

from flowroll.engine.worker import EngineWorker
from flowroll.errors import EngineError, ShuttingDownError
from flowroll.types import GeneratedImage, SamplingParams

Evidence: TypeAlias = Literal["recent", "running", "paused", "updating", "asleep", "probe"]

_RECENT_S = 30.0
_TIMEOUT_S = 20.0


class GenerationProbe:
    """Answers /health_generate. Its methods run on the event loop.

    Args:
        worker: Runs the probe's generation like any other request.
    """

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._attempt: Future[list[GeneratedImage]] | None = None

    async def check(self) -> Evidence:
        """What shows that the engine works: a result in the last 30 s, a request that makes progress, or a one-step image.

        A paused engine, one that waits for the rest of a push of weights, or one that sleeps, shows nothing and is well.

        Callers at the same time share one generation.

        Raises:
            ShuttingDownError: The engine takes no more work.
            EngineError: The running request, or the probe, does not come to an end.
            FlowrollError: What the probe's generation raised.
        """
        worker = self._worker
        if not worker.is_accepting:
            raise ShuttingDownError("the engine must take requests to generate, got a shutdown; use another replica.")
        if worker.engine.is_asleep:
            return "asleep"
        since_s = worker.seconds_since_success()
        if since_s is not None and since_s < _RECENT_S:
            return "recent"
        if self._is_held_up():
            return "running"
        if worker.is_paused:
            return "paused"
        if worker.load().is_holding:
            return "updating"
        if worker.running and not self._is_running():
            raise EngineError("the running request must come to an end, got far more time than its size explains; restart.")
        return await self._generate()

    async def _generate(self) -> Evidence:
        if self._attempt is None or self._attempt.done():
            self._attempt = self._worker.submit(self._worker.engine.plan(self._params()), "generate")
        try:
            # Shielded: a caller that gives up must not take the others' answer with it.
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._attempt)), _TIMEOUT_S)
        except TimeoutError:
            if self._is_held_up():
                return "running"
            if self._worker.load().is_holding:
                return "updating"
            raise EngineError(f"a one-step image must take less than {_TIMEOUT_S:.0f} s, got no end; restart.") from None
        return "probe"

    def _is_running(self) -> bool:
        return self._attempt is not None and self._attempt.running()

    def _is_held_up(self) -> bool:
        """Whether somebody else's request runs, and well. The probe's own is no evidence before it ends."""
        return not self._is_running() and self._worker.is_progressing()

    def _params(self) -> SamplingParams:
        side = self._worker.engine.info.pixel_unit
        return SamplingParams(
            prompt="",
            seed=0,
            height=side,
            width=side,
            num_inference_steps=1,
            true_cfg_scale=0,
            rollout=False,
            suppress_logs=True,
        )
