"""Drives an engine's work on the test's own thread, one piece at a time: no threads, no waiting, the same order every time."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from flowroll import GeneratedImage, Rollout, SamplingParams
from flowroll.engine import Engine
from flowroll.engine.batching import Batcher


def work_once(batcher: Batcher) -> bool:
    """One piece of work of every line; False: there was none."""
    return any([batcher.encoding.work(), batcher.stepping.work(), batcher.decoding.work()])


def drive(batcher: Batcher, until: Callable[[], bool]) -> None:
    """Works until the condition holds; a batcher that has nothing to do before that fails the test."""
    while not until():
        assert work_once(batcher) or until(), "nothing is left to do"


def drive_to_end(batcher: Batcher, *futures: Future[Any]) -> None:
    """Works until all of them have ended."""
    drive(batcher, lambda: all(future.done() for future in futures))


def rollout_here(engine: Engine, **fields: Any) -> list[Rollout]:
    """`Engine.rollout` on this thread."""
    return _answer_here(engine, SamplingParams(**fields), engine._as_rollout)


def generate_here(engine: Engine, **fields: Any) -> list[GeneratedImage]:
    """`Engine.generate` on this thread."""
    return _answer_here(engine, SamplingParams(**fields, rollout=False), engine._as_image)


def _answer_here(engine: Engine, params: SamplingParams, finish: Any) -> list[Any]:
    assert engine.batcher.halt(10.0)
    accepted = engine.batcher.submit(engine.plan(params), finish)
    drive_to_end(engine.batcher, accepted)
    return accepted.result()
