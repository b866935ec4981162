"""Drives an engine's requests on the test's own thread, one piece at a time, in the same order every time."""

from typing import Any

from tests.unit.engine.scheduler.hand import HandStage

from flowroll import GeneratedImage, Rollout, SamplingParams
from flowroll.engine import Engine
from flowroll.engine.scheduler import Scheduler


def rollout_here(engine: Engine, **fields: Any) -> list[Rollout]:
    """`Engine.rollout` on this thread."""
    return _answer_here(engine, SamplingParams(**fields), engine._as_rollout)


def generate_here(engine: Engine, **fields: Any) -> list[GeneratedImage]:
    """`Engine.generate` on this thread."""
    return _answer_here(engine, SamplingParams(**fields, rollout=False), engine._as_image)


def _answer_here(engine: Engine, params: SamplingParams, finish: Any) -> list[Any]:
    encoder, decoder = HandStage(), HandStage()
    scheduler = Scheduler(engine._executor, engine.scheduler.limits, encoder=encoder, decoder=decoder)
    future = scheduler.submit(engine.plan(params), finish)
    while not future.done():
        assert any([scheduler.loop.turn(), encoder.work(), decoder.work()]) or future.done(), "nothing is left to do"
    return future.result()
