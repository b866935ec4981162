"""GET /viewer: pages about the rollouts in a store, with the engine to decode and replay them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from fastapi import APIRouter
from torch import Tensor

from flowroll.engine.scheduler.request import too_late
from flowroll.engine.scoring import plan_score
from flowroll.engine.service import EngineService
from flowroll.serving.state import AppState
from flowroll.store import open_rollouts
from flowroll.types import ScoreAnswer, ScoreParams
from flowroll.viewer import Pages, viewer_router

T = TypeVar("T")
# Decoding and replaying wait for their turn between the steps of requests.
_WAIT_S = 120.0


def build_router(state: AppState, path: str, prefix: str) -> APIRouter:
    """Returns the pages, which ask for the API key themselves.

    Args:
        state: The state of the app.
        path: The store, or the folder of files.
        prefix: In front of every path.
    """
    pages = Pages(open_rollouts(path), model=_ServedModel(state), title=path, prefix=prefix)
    return viewer_router(pages, prefix=prefix, api_key=state.config.api_key)


class _ServedModel:
    """The server's engine as the viewer asks it, from a thread of its own."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    def decode(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        """Decodes the latents of one sample into a picture."""
        return _awaited(self._state.engine.call(EngineService.decode, latents, height=height, width=width))

    def run_scores(self, params: ScoreParams) -> ScoreAnswer:
        """Recomputes the log-probs of recorded steps under the weights in memory."""
        self._state.pushes.check_whole()
        facts = self._state.engine.facts
        plan = plan_score(params, facts.model, facts.info.limits)
        return _awaited(self._state.engine.call(EngineService.submit_scores, plan, timeout_s=_WAIT_S))


def _awaited(answer: Future[T]) -> T:
    try:
        return answer.result(_WAIT_S)
    except TimeoutError:
        raise too_late(_WAIT_S) from None
