"""Finds out whether an engine can generate: from recent results, from what runs now, or by generating an image."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

from flowroll.engine.engine import Engine
from flowroll.engine.images import blank_image
from flowroll.engine.service.status import Evidence
from flowroll.errors import EngineError
from flowroll.types import GeneratedImage, SamplingParams

_RECENT_S = 30.0
_TIMEOUT_S = 20.0


class GenerationProbe:
    """Finds evidence that an engine works. Concurrent callers share one generation.

    Args:
        engine: The engine, which runs the probe's generation like any other request.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last_success_s: float | None = None
        self._attempt: Future[list[GeneratedImage]] | None = None
        self._attempting = threading.Lock()

    def note_end(self, ended: Future[Any]) -> None:
        """Notes that a request has ended."""
        if not ended.cancelled() and ended.exception() is None:
            self._last_success_s = time.monotonic()

    def check(self) -> Evidence:
        """Looks for a result in the last 30 s or a request that makes progress; otherwise generates an image in one step.

        An engine that is paused, waits for the rest of a push of weights, or sleeps counts as healthy without any generation.

        Returns:
            The kind of evidence that was found.

        Raises:
            EngineError: The running request or the probe's own does not end.
            FlowrollError: The probe's generation failed with this error.
        """
        if self._engine.is_asleep:
            return "asleep"
        if self._last_success_s is not None and time.monotonic() - self._last_success_s < _RECENT_S:
            return "recent"
        if self._is_held_up():
            return "running"
        load = self._engine.scheduler.load()
        if load.is_paused:
            return "paused"
        if load.is_holding:
            return "updating"
        if load.requests.running and not self._is_running():
            raise EngineError("the running request must come to an end, got far more time than its size explains; restart.")
        return self._generate()

    def _generate(self) -> Evidence:
        with self._attempting:
            if self._attempt is None or self._attempt.done():
                self._attempt = self._engine.submit(self._engine.plan(self._params()), "generate")
                self._attempt.add_done_callback(self.note_end)
            attempt = self._attempt
        try:
            attempt.result(_TIMEOUT_S)
        except TimeoutError:
            if self._is_held_up():
                return "running"
            if self._engine.scheduler.load().is_holding:
                return "updating"
            raise EngineError(f"a one-step image must take less than {_TIMEOUT_S:.0f} s, got no end; restart.") from None
        return "probe"

    def _is_running(self) -> bool:
        return self._attempt is not None and self._attempt.running()

    def _is_held_up(self) -> bool:
        """Returns whether another request than the probe's makes progress; the probe's own is no evidence until it ends."""
        return not self._is_running() and self._engine.scheduler.is_progressing()

    def _params(self) -> SamplingParams:
        # Of one token, blocks would be compiled anew.
        side = 2 * self._engine.info.pixel_unit
        return SamplingParams(
            prompt="",
            images=(blank_image(),) if self._engine.info.max_images else None,
            seed=0,
            height=side,
            width=side,
            num_inference_steps=1,
            true_cfg_scale=0,
            rollout=False,
            suppress_logs=True,
        )
