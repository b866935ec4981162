"""Requests that are encoded while they wait, and steps that wait for requests which are being encoded."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import ALL, Hand

from flowroll.engine import BatchLimits, Engine
from flowroll.engine.runner import model_runner
from flowroll.engine.runner.executor import Executor
from flowroll.engine.scheduler.policy import Gathering
from flowroll.errors import CancelledRequestError, DeadlineExceededError, EngineError


@pytest.fixture
def one(engine: Engine) -> Hand:
    """One sample runs at a time, so that the second request is encoded ahead and waits."""
    hand = Hand(engine, max_running_samples=1)
    hand.finish(hand.submit(seed=100))
    return hand


def encoded(hand: Hand) -> Counter[int]:
    """How often the request of each seed is encoded from now on."""
    seeds: Counter[int] = Counter()
    hand.work.before_encode = lambda plan: seeds.update([plan.seeds[0]])
    return seeds


def encode_beside_a_step(hand: Hand) -> None:
    """Encodes all that the encoder was given, as its thread may do while the loop is in a step."""
    assert hand._encoder is not None
    while hand._encoder.work():
        pass


def test_many_prompts_are_encoded_during_one_step_and_their_samples_start_together(hand: Hand) -> None:
    first = hand.submit(num_inference_steps=8)
    hand.encode()
    hand.step()
    others = [hand.submit(seed=seed) for seed in range(2, 8)]
    encode_beside_a_step(hand)
    expected = [hand.alone(seed=seed, **ALL)[0] for seed in (2, 7)]
    asked = [hand.submit(seed=seed, **ALL) for seed in (2, 7)]
    encode_beside_a_step(hand)
    for found, alone in zip(hand.finish(*asked), expected, strict=True):
        assert_same_bits(found[0], alone)
    hand.finish(first, *others)
    assert hand.scheduler.load().batches == {1: 4, 9: 4}


def test_where_samples_share_no_forward_one_prompt_at_most_is_encoded_during_a_step(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Executor, "shares_forwards", False)
    hand.finish(hand.submit())
    seeds = encoded(hand)
    requests = [hand.submit(seed=seed) for seed in range(4)]
    for number in range(1, 5):
        encode_beside_a_step(hand)
        assert sum(seeds.values()) == number
        hand.step()
    hand.finish(*requests)


@pytest.mark.parametrize(("batch", "running", "ahead"), [(2, 4, 2), (2, 1, 1)])
def test_no_more_requests_are_encoded_ahead_than_can_share_the_next_forward(
    engine: Engine, batch: int, running: int, ahead: int
) -> None:
    hand = Hand(engine, max_batch_samples=batch, max_running_samples=running)
    seeds = encoded(hand)
    requests = hand.begin(*[{"seed": seed} for seed in range(12)])
    for _ in range(3):
        assert sum(seeds.values()) == running + ahead
        assert (hand.stats()["running"], hand.stats()["pending"]) == (running, 12 - running)
        hand.step()
        while hand.encode():
            pass
    hand.finish(*requests)
    assert set(seeds.values()) == {1}


def test_no_more_bytes_are_encoded_ahead_than_the_limit(one: Hand) -> None:
    seeds, held = encoded(one), one.scheduler.loop._ahead
    held._limits = BatchLimits()
    held._most_bytes = 2 * held._largest
    assert held._largest
    requests = one.begin(*[{"seed": seed} for seed in range(6)])
    one.step()
    assert sorted(seeds) == [0, 1, 2]
    one.finish(*requests)
    assert set(seeds.values()) == {1} and len(seeds) == 6


def cancel(hand: Hand, future: Any) -> type[Exception]:
    hand.cancel(future)
    return CancelledRequestError


def expire(hand: Hand, future: Any) -> type[Exception]:
    hand.clock.now_s += 60.0
    hand.settle()
    return DeadlineExceededError


@pytest.mark.parametrize("end", [cancel, expire])
@pytest.mark.parametrize("is_encoded", [False, True])
def test_a_request_that_ends_while_it_is_encoded_ahead_leaves_nothing(
    one: Hand, end: Callable[[Hand, Any], type[Exception]], is_encoded: bool
) -> None:
    running, meant = one.submit(), one.submit(seed=2, timeout_s=50.0)
    one.encode()
    one.step()
    if is_encoded:
        one.encode()
    error = end(one, meant)
    assert isinstance(meant.exception(0), error)
    assert one.stats()["running"] == 1 and not one.scheduler.loop._ahead.clear()
    assert len(one.finish(running)[0]) == 1
    one.drain()
    assert one.work._runner._conditionings == {} and one.scheduler.loop.is_idle()
    assert len(one.finish(one.submit(seed=3))[0]) == 1


def test_a_failure_while_a_request_is_encoded_ahead_ends_it_alone(one: Hand) -> None:
    running, meant = one.submit(), one.submit(seed=2)
    one.encode()

    def fail(plan: Any) -> None:
        raise MemoryError("all of it")

    one.work.before_encode = fail
    one.encode()
    assert isinstance(meant.exception(0), EngineError) and one.stats()["failed"] == 1
    assert len(one.finish(running)[0]) == 1


@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize("mode", ["drain", "abort"])
def test_a_change_of_the_model_does_not_wait_for_what_is_encoded_ahead_which_is_encoded_again(
    one: Hand, mode: str, is_encoded: bool
) -> None:
    seeds = encoded(one)
    running, ahead = one.submit(), one.submit(seed=2)
    one.encode()
    one.step()
    if is_encoded:
        one.encode()
    seen: list[tuple[bool, bool]] = []
    done = one.exclusive(lambda: seen.append((running.done(), ahead.done())), mode=mode)
    order: list[int] = []
    one.work.before_decode = lambda sample: order.append(sample.seed)
    assert len(one.finish(running, ahead, done)[1]) == 1
    assert seen == [(mode == "drain", False)]
    assert seeds[2] == 1 + is_encoded and order == [1, 2]


@pytest.mark.parametrize("mode", ["finish", "freeze"])
def test_a_pause_puts_off_what_is_encoded_ahead_and_keeps_it(one: Hand, mode: str) -> None:
    seeds = encoded(one)
    running, ahead = one.submit(), one.submit(seed=2)
    one.encode()
    one.encode()
    one.step()
    one.pause(mode)
    if mode == "finish":
        assert len(one.finish(running)[0]) == 1
    one.drain()
    assert one.stats()["running"] == (mode == "freeze") and one.stats()["pending"] == 1
    one.resume()
    one.finish(running, ahead)
    assert seeds == {1: 1, 2: 1}


def test_the_stages_of_a_request_that_is_encoded_ahead_are_what_they_took(one: Hand) -> None:
    def passes(plan: Any) -> None:
        one.clock.now_s += 2.0

    one.work.before_encode = passes
    one.submit()
    ahead = one.submit(seed=2)
    one.encode()
    one.step()
    one.clock.now_s += 1.0
    one.encode()
    one.clock.now_s += 4.0
    one.finish(ahead)
    # Two seconds until the first one was encoded, and one more; later four.
    assert (ahead.timing.queue, ahead.timing.encode) == (7.0, 2.0)


@pytest.fixture
def slow(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> Hand:
    """A step takes eight seconds, which is known."""
    forward = model_runner.forward

    def slowly(batch: Any) -> Any:
        hand.clock.now_s += 8.0
        return forward(batch)

    monkeypatch.setattr(model_runner, "forward", slowly)
    hand.finish(hand.submit())
    hand.scheduler.loop._queue.counters.batches.clear()
    return hand


def test_a_step_waits_for_requests_that_can_share_its_forward(slow: Hand) -> None:
    futures = [slow.submit(seed=seed) for seed in range(3)]
    for left in (2, 1):
        slow.encode()
        slow.step(2)
        assert slow.scheduler.load().steps == 0 and slow.stats()["running"] == 3 - left + 1
        # All four steps' time, from the first sample on.
        assert slow.scheduler.loop.idle_s() == 32.0
    slow.finish(*futures)
    assert slow.scheduler.load().batches == {3: 4}


def test_a_step_waits_no_longer_than_the_samples_would_take_and_for_no_request_twice(slow: Hand) -> None:
    first = slow.submit()
    slow.encode()
    second = slow.submit(seed=2)
    slow.clock.now_s += 1.0
    slow.step()
    slow.clock.now_s += 31.0
    slow.step()
    assert slow.scheduler.load().steps == 0
    slow.clock.now_s += 1.0
    slow.step(2)
    assert slow.scheduler.load().steps == 2
    slow.encode()
    third = slow.submit(seed=3)
    # Samples that have taken a step wait for one, and two can wait no better than one.
    slow.step()
    assert slow.scheduler.loop.idle_s() == 8.0 and slow.scheduler.load().steps == 2
    slow.clock.now_s += 8.0
    slow.step()
    assert slow.scheduler.load().steps == 4
    slow.finish(first, second, third)


def test_a_step_does_not_wait_for_a_request_that_has_ended(slow: Hand) -> None:
    slow.submit()
    slow.encode()
    other = slow.submit(seed=2)
    slow.step()
    assert slow.scheduler.load().steps == 0
    slow.cancel(other)
    slow.step()
    assert slow.scheduler.load().steps == 1


@pytest.mark.parametrize("reason", ["another size", "no room in the forward", "forwards of their own", "paused"])
def test_a_step_waits_for_nothing_that_would_not_share_its_forward(
    slow: Hand, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "no room in the forward":
        slow.scheduler.loop._samples._limits = BatchLimits(max_batch_samples=1)
    if reason == "forwards of their own":
        monkeypatch.setattr(Executor, "shares_forwards", False)
    slow.submit()
    slow.encode()
    slow.submit(seed=2, height=64 if reason == "another size" else 32)
    if reason == "paused":
        slow.step()
        slow.pause("freeze")
        slow.step()
        # Not the moment at which the step would have been taken.
        assert slow.scheduler.loop.idle_s() is None
        return
    slow.step()
    assert slow.scheduler.load().steps == 1


def test_before_any_step_was_taken_none_waits() -> None:
    gathering = Gathering()
    assert gathering.until_s(1, steps=8, now_s=100.0) is None
    gathering.note_step(2.0)
    # It is not waited for later either.
    assert gathering.until_s(1, steps=8, now_s=100.0) is None
    assert gathering.until_s(2, steps=8, now_s=100.0) == 116.0
