"""The stages on threads of their own: what is slow in one holds up no other."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.hooked import WAIT_S
from tests.unit.engine.scheduler.hand import Hand

from flowroll.engine import Engine

HELD_SEED = 99


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_steps_go_on_while_a_prompt_is_encoded_or_a_picture_decoded(engine: Engine, stage: str) -> None:
    hand, entered, opened = Hand(engine, threads=True), threading.Event(), threading.Event()

    def hold(seeds: tuple[int, ...]) -> None:
        if HELD_SEED in seeds:
            entered.set()
            assert opened.wait(WAIT_S)

    def before_decode(sample: Any) -> None:
        hold((sample.seed,))

    def before_encode(plan: Any) -> None:
        hold(plan.seeds)

    setattr(hand.work, f"before_{stage}", {"encode": before_encode, "decode": before_decode}[stage])
    hand.scheduler.start()
    try:
        long = hand.submit(num_inference_steps=1000, num_outputs_per_prompt=8, debug_mode=False)
        held = hand.submit(seed=HELD_SEED, num_inference_steps=1)
        assert entered.wait(WAIT_S)
        steps = hand.scheduler.load().steps
        wait_for(lambda: hand.scheduler.load().steps > steps + 50)
        assert not held.done() and not long.done()
        opened.set()
        assert len(held.result(WAIT_S)) == 1
        hand.cancel(long)
    finally:
        opened.set()
        assert hand.scheduler.halt(WAIT_S)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
