"""Forks among other requests: their children wait their turn, and leave nothing behind however the request ends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import ALL, Hand

from flowroll.engine import Engine
from flowroll.engine.runner import model_runner
from flowroll.engine.runner import sample as samples
from flowroll.errors import CancelledRequestError, DeadlineExceededError, EngineError

TREE: dict[str, Any] = {**ALL, "num_outputs_per_prompt": 2, "fork": {1: 2, 3: 2}}


def assert_nothing_is_left(hand: Hand) -> None:
    hand.drain()
    assert hand.work.samples == [] and hand.work._runner._num_unborn == {} and hand.work._runner._conditionings == {}
    assert hand.scheduler.load().running_samples == 0
    stats = hand.stats()
    assert (stats["pending"], stats["running"]) == (0, 0)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def test_trees_share_forwards_with_others_and_keep_their_bits(engine: Engine) -> None:
    hand = Hand(engine, max_batch_samples=3, max_running_samples=4)
    requests = [TREE, {**ALL, "seed": 9}, {**ALL, "seed": 7, "fork": {0: 3}}]
    expected = [hand.alone(**fields) for fields in requests]
    endings = hand.finish(*hand.begin(*requests))
    for found, alone in zip(endings, expected, strict=True):
        assert_same(found, alone)
    load = hand.scheduler.load()
    # Steps by level: 2 x (2 + 2 x 2), no forward after the last fork; 4; 1 + 3 x 3.
    assert load.steps == 12 + 4 + 10 and max(load.batches) == 3
    assert_nothing_is_left(hand)


def test_no_more_samples_are_in_memory_than_the_limit(engine: Engine) -> None:
    hand = Hand(engine, max_running_samples=3)
    future, seen = hand.submit(**TREE), set()
    while not future.done():
        assert hand.work_once()
        seen.add(hand.scheduler.load().running_samples)
    assert max(seen) == 3 and len(future.result()) == 8
    assert_nothing_is_left(hand)


def test_a_tree_is_walked_in_depth_before_later_samples_start(engine: Engine) -> None:
    """States that wait for their children would pile up otherwise."""
    hand, order = Hand(engine, max_running_samples=1), []
    hand.work.before_decode = lambda sample: order.append((sample.seed, sample.planned.index))
    hand.finish(hand.submit(**TREE), hand.submit(seed=9))
    assert order == [*((1 + index // 4, index) for index in range(8)), (9, 0)]


def test_a_frozen_tree_stands_still_and_goes_on(hand: Hand) -> None:
    expected = hand.alone(**TREE)
    (future,) = hand.begin(TREE)
    hand.step(2)
    hand.pause("freeze")
    steps, running = hand.scheduler.load().steps, hand.scheduler.load().running_samples
    hand.step(3)
    assert (hand.scheduler.load().steps, hand.scheduler.load().running_samples) == (steps, running)
    hand.resume()
    assert_same(hand.finish(future)[0], expected)
    assert_nothing_is_left(hand)


def test_a_tree_that_gives_way_to_new_weights_is_done_again_wholly(hand: Hand) -> None:
    expected = hand.alone(**TREE)
    for turns in range(1, 5):
        (future,) = hand.begin(TREE)
        hand.step(turns)
        done = hand.exclusive(lambda: hand.work.samples == [] and hand.work._runner._num_unborn == {}, mode="abort")
        assert_same(hand.finish(future)[0], expected)
        assert done.result(0)
        assert_nothing_is_left(hand)


def cancel(hand: Hand, future: Any) -> type[Exception]:
    hand.cancel(future)
    return CancelledRequestError


def expire(hand: Hand, future: Any) -> type[Exception]:
    hand.clock.now_s += 100
    return DeadlineExceededError


@pytest.mark.parametrize("end", [cancel, expire])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_tree_that_ends_early_leaves_no_state(engine: Engine, end: Callable[..., type[Exception]], turns: int) -> None:
    hand = Hand(engine, max_running_samples=2)
    future = hand.submit(**TREE, timeout_s=50.0)
    hand.encode()
    hand.step(turns)
    assert hand.work.samples
    kind = end(hand, future)
    hand.step()
    assert isinstance(future.exception(0), kind)
    assert_nothing_is_left(hand)


def test_a_forward_of_leaves_that_runs_out_of_memory_is_taken_in_halves(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hand.alone(**TREE)
    forward = model_runner.forward

    def failing(batch: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too many")
        return forward(batch)

    monkeypatch.setattr(model_runner, "forward", failing)
    (future,) = hand.begin(TREE)
    assert_same(hand.finish(future)[0], expected)
    assert max(hand.scheduler.load().batches) > 2
    assert_nothing_is_left(hand)


def test_a_child_that_fails_ends_its_request_alone(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hand.alone(**ALL, seed=9)
    branch = samples.Sample.branch

    def failing(sample: Any, planned: Any) -> Any:
        if planned.branches[-1].id == "1/0/1":
            raise torch.OutOfMemoryError("no memory for the child")
        return branch(sample, planned)

    monkeypatch.setattr(samples.Sample, "branch", failing)
    bad, good = hand.finish(*hand.begin(TREE, {**ALL, "seed": 9}))
    assert isinstance(bad, EngineError) and "no memory for the child" in bad.message
    assert_same(good, expected)
    assert_nothing_is_left(hand)
