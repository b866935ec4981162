"""Requests that end before all of their samples have: with those that are finished, or because newer weights wait."""

import time
from pathlib import Path

import pytest
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import ALL, Hand
from tests.weights import REQUEST, with_other

from flowroll.engine import Engine
from flowroll.errors import CancelledRequestError, InvalidRequestError, OutdatedWeightsError


@pytest.mark.parametrize("fork", [None, {1: 2}])
def test_an_abort_can_keep_the_samples_that_are_finished(engine: Engine, fork: dict[int, int] | None) -> None:
    hand = Hand(engine, max_batch_samples=1, max_running_samples=1)
    asked = {"num_outputs_per_prompt": 3, "request_id": "mine", "fork": fork, **ALL}
    meant, waiting = hand.submit(**asked), hand.submit(request_id="mine")
    leaves = 1 if fork is None else 2
    while len(hand.scheduler.loop._queue._running) == 0 or len(next(iter(hand.scheduler.loop._queue.running)).results) < leaves:
        hand.work_once()
    assert hand.abort("mine", keep_partial=True) == 2
    hand.drain()
    found, whole = meant.result(0), hand.alone(**{**asked, "request_id": None})
    assert [one.left_out for one in found] == [tuple(range(leaves, 3 * leaves))] * leaves
    for one, expected in zip(found, whole, strict=False):
        assert_same_bits(one, expected)
        assert expected.left_out == ()
    assert isinstance(waiting.exception(0), CancelledRequestError)
    assert hand.stats() == {"accepted": 2, "completed": 1, "failed": 1, "pending": 0, "running": 0}
    assert hand.scheduler.load().running_samples == 0


def test_an_abort_without_a_finished_sample_is_a_cancellation(hand: Hand) -> None:
    (meant,) = hand.begin({"num_outputs_per_prompt": 2})
    hand.step(2)
    assert hand.abort(None, keep_partial=True) == 1
    assert isinstance(meant.exception(0), CancelledRequestError)


def test_running_samples_end_that_newer_weights_would_make_too_old(hand: Hand) -> None:
    strict, lax, free = hand.begin({"max_staleness": 0, "seed": 1}, {"max_staleness": 1, "seed": 2}, {"seed": 3})
    hand.step()
    waiting = hand.submit(max_staleness=0, seed=4)
    other = hand.exclusive(lambda: None)
    assert not strict.done()
    one = hand.exclusive(lambda: None, is_newer=True)
    refused = strict.exception(0)
    assert isinstance(refused, OutdatedWeightsError) and refused.field == "max_staleness"
    assert not lax.done()
    two = hand.exclusive(lambda: None, is_newer=True)
    assert isinstance(lax.exception(0), OutdatedWeightsError)
    results = hand.finish(free, other, one, two, waiting)
    assert results[0][0].seed == 3 and results[-1][0].seed == 4


def test_what_starts_again_with_the_newer_weights_is_not_too_old(hand: Hand) -> None:
    (strict,) = hand.begin({"max_staleness": 0})
    hand.step()
    done = hand.exclusive(lambda: None, mode="abort", is_newer=True)
    assert hand.finish(strict, done)[0][0].seed == 1


def test_samples_say_when_and_by_which_weights_their_steps_were_taken(z_image_checkpoint: Path, tmp_path: Path) -> None:
    other = with_other(z_image_checkpoint, tmp_path / "weights")
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.copy_policy("old")
        for name, number in (("0", 0), ("named", 1)):
            before = time.time()
            (image,) = engine.generate("a cat", height=64, width=64, num_inference_steps=2)
            for one in (*engine.rollout(**REQUEST, num_outputs_per_prompt=2, fork={1: 2}), image):
                assert one.first_step is not None and one.last_step is not None
                for stamp in (one.first_step, one.last_step):
                    assert (stamp.weight_version, stamp.version_number) == (name, number)
                assert before <= one.first_step.time_s < one.last_step.time_s <= time.time()
            engine.update_weights_from_disk(other, weight_version="named")
        # An old policy is as old as the weights that it was copied from.
        (rollout,) = engine.rollout(**REQUEST, policy="old", max_staleness=1)
        assert rollout.first_step is not None and rollout.first_step.version_number == 0
        with pytest.raises(OutdatedWeightsError, match="1 behind"):
            engine.rollout(**REQUEST, policy="old", max_staleness=0)
        engine.rollout(**REQUEST, max_staleness=0)
        with pytest.raises(InvalidRequestError, match="max_staleness"):
            engine.rollout(**REQUEST, max_staleness=-1)
