"""What fails, fails alone: in the encoder, in a forward, in a step, in the decoder. And every request ends exactly once."""

import gc
import logging
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import ALL, Hand

from flowroll.engine import Engine, RequestFuture
from flowroll.engine.runner import model_runner
from flowroll.engine.runner import sample as samples
from flowroll.errors import EngineError, FlowrollError, PausedError, QueueFullError

BAD_SEED = 13


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is made to fail here is logged in full; nobody has to read it."""
    logger = logging.getLogger("flowroll.engine.scheduler")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


def fail_in_encode(hand: Hand, _: pytest.MonkeyPatch) -> None:
    def fail(plan: Any) -> None:
        if BAD_SEED in plan.seeds:
            raise torch.OutOfMemoryError("no memory for the text encoder")

    hand.work.before_encode = fail


def fail_in_decode(hand: Hand, _: pytest.MonkeyPatch) -> None:
    def fail(sample: Any) -> None:
        if sample.seed == BAD_SEED:
            raise torch.OutOfMemoryError("no memory for the decoder")

    hand.work.before_decode = fail


def fail_in_start(hand: Hand, patch: pytest.MonkeyPatch) -> None:
    start = samples.Sample.start

    def failing(conditioning: Any, planned: Any) -> Any:
        if planned.seed == BAD_SEED:
            raise torch.OutOfMemoryError("no memory for the noise")
        return start(conditioning, planned)

    patch.setattr(samples.Sample, "start", failing)


def fail_in_step(hand: Hand, patch: pytest.MonkeyPatch) -> None:
    step = samples.recorded_step

    def failing(sample: Any, velocity: Any) -> None:
        if sample.seed == BAD_SEED and sample.step == 2:
            raise torch.OutOfMemoryError("no memory for the step")
        step(sample, velocity)

    patch.setattr(samples, "recorded_step", failing)


def fail_in_forward(hand: Hand, patch: pytest.MonkeyPatch) -> None:
    """Every forward that has the bad sample in it fails, be it alone there or not."""
    forward = model_runner.forward

    def failing(batch: Any) -> Any:
        if any(sample.seed == BAD_SEED and sample.step == 2 for sample in batch):
            raise torch.OutOfMemoryError("no memory for the forward")
        return forward(batch)

    patch.setattr(model_runner, "forward", failing)


FAULTS = [fail_in_encode, fail_in_start, fail_in_forward, fail_in_step, fail_in_decode]


@pytest.mark.parametrize("inject", FAULTS)
def test_a_failure_ends_its_request_alone_and_the_others_keep_their_bits(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, inject: Callable[[Hand, pytest.MonkeyPatch], None]
) -> None:
    good = {**ALL, "seed": 1, "num_outputs_per_prompt": 2}
    late = {**ALL, "seed": 5}
    expected = [hand.alone(**fields) for fields in (good, late)]
    with monkeypatch.context() as patch:
        inject(hand, patch)
        first, bad, bad_group = hand.submit(**good), hand.submit(seed=BAD_SEED), hand.submit(seeds=(12, BAD_SEED, 14))
        endings = hand.finish(first, bad, bad_group)
        last = hand.submit(**late)
        (second,) = hand.finish(last)
    for error in endings[1:]:
        assert isinstance(error, EngineError) and "OutOfMemoryError: no memory for the" in error.message
        # What was raised holds tensors in its frames; nothing may keep it.
        assert error.__cause__ is None and error.__context__ is None
    for ours, alone in zip([*endings[0], *second], [*expected[0], *expected[1]], strict=True):
        assert_same_bits(ours, alone)
    hand.drain()
    assert hand.stats() == {"accepted": 4, "completed": 2, "failed": 2, "pending": 0, "running": 0}
    assert hand.scheduler.load().running_samples == 0
    assert hand.scheduler.load().failures == {"engine_error": 2}


@pytest.mark.parametrize("error", [RuntimeError("this once"), torch.OutOfMemoryError("this once")])
def test_a_forward_that_failed_is_taken_again_in_halves(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """One that ran out of memory is not tried at that size again; after another failure the batch goes on together."""
    sizes: list[int] = []
    forward = model_runner.forward

    def failing_once(batch: Any) -> Any:
        sizes.append(len(batch))
        if sizes == [3, 3]:
            raise error
        return forward(batch)

    (expected,) = hand.finish(hand.submit(num_outputs_per_prompt=3, **ALL))
    monkeypatch.setattr(model_runner, "forward", failing_once)
    (group,) = hand.begin({"num_outputs_per_prompt": 3, **ALL})
    (rollouts,) = hand.finish(group)
    for ours, before in zip(rollouts, expected, strict=True):
        assert_same_bits(ours, before)
    if isinstance(error, torch.OutOfMemoryError):
        # The two oldest to their end, then the third.
        assert sizes == [3, 3, 2, 1, 2, 2, 1, 1]
    else:
        assert sizes == [3, 3, 2, 1, 3, 3]


def test_a_batch_that_does_not_fit_shrinks_until_it_does_and_each_sample_keeps_its_bits(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[int] = []
    forward = model_runner.forward

    def of_three_at_most(batch: Any) -> Any:
        if len(batch) > 3:
            failed.append(len(batch))
            raise torch.OutOfMemoryError("room for three")
        return forward(batch)

    (expected,) = hand.finish(hand.submit(num_outputs_per_prompt=9, **ALL))
    monkeypatch.setattr(model_runner, "forward", of_three_at_most)
    (rollouts,) = hand.finish(hand.submit(num_outputs_per_prompt=9, **ALL))
    for ours, before in zip(rollouts, expected, strict=True):
        assert_same_bits(ours, before)
    # Never again after the first step: 9 is taken in 5 and 4, each of which is halved once more.
    assert failed == [9, 5, 4]


def test_what_a_failure_held_is_free_at_once(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the garbage collector comes by: after running out of memory that is too late."""
    velocities: list[Any] = []

    def failing(sample: Any, velocity: torch.Tensor) -> None:
        velocities.append(weakref.ref(velocity))
        raise torch.OutOfMemoryError("no memory for the step")

    monkeypatch.setattr(samples, "recorded_step", failing)
    gc.disable()
    try:
        (error,) = hand.finish(hand.submit())
        assert isinstance(error, EngineError) and len(velocities) == 1
        assert velocities[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError("all of it")])
def test_not_even_what_ends_a_thread_ends_the_loop(hand: Hand, error: BaseException) -> None:
    def fail(*_: object) -> None:
        hand.work.before_decode = lambda sample: None
        raise error

    hand.work.before_decode = fail
    bad, good = hand.finish(hand.submit(), hand.submit())
    assert isinstance(bad, EngineError) and type(error).__name__ in bad.message
    assert len(good) == 1


@pytest.mark.slow
@pytest.mark.parametrize("inject", FAULTS)
def test_every_accepted_request_ends_exactly_once_in_a_storm(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, inject: Callable[[Hand, pytest.MonkeyPatch], None]
) -> None:
    """Random requests, cancellations, deadlines, pauses, exclusive actions, faults; the counters balance after each of them."""
    source = random.Random(FAULTS.index(inject))
    hand = Hand(engine, max_batch_samples=4, max_running_samples=5)
    inject(hand, monkeypatch)
    ends: Counter[int] = Counter()
    accepted: list[RequestFuture[Any]] = []
    refused = tasks = 0

    def submit() -> None:
        nonlocal refused
        seed = source.choice([1, 2, 3, BAD_SEED])
        timeout_s = source.choice([None, 2.0])
        try:
            one = hand.submit(
                seed=seed,
                num_inference_steps=source.choice([1, 2, 3, 3, 3]),
                num_outputs_per_prompt=source.choice([1, 2]),
                height=source.choice([32, 48]),
                request_id=source.choice(["a", "b"]),
                timeout_s=timeout_s,
                max_waiting=6,
            )
        except (PausedError, QueueFullError):
            refused += 1
            return
        one.add_done_callback(lambda ended: ends.update([id(ended)]))
        accepted.append(one)

    def exclusive() -> None:
        nonlocal tasks
        done = hand.exclusive(lambda: None, mode=source.choice(["drain", "abort"]))
        tasks += not done.done()

    def tick() -> None:
        hand.clock.now_s += source.choice([0.1, 1.0])

    moves: list[tuple[float, Callable[[], object]]] = [
        (0.25, submit),
        (0.03, lambda: accepted and hand.cancel(source.choice(accepted))),
        (0.03, lambda: accepted and source.choice(accepted).cancel()),
        (0.01, lambda: hand.abort("a")),
        (0.02, lambda: hand.pause(source.choice(["finish", "freeze"]))),
        (0.05, hand.resume),
        (0.02, exclusive),
        (0.05, tick),
        (0.15, hand.encode),
        (0.25, hand.step),
        (0.14, hand.decode),
    ]
    weights, actions = zip(*moves, strict=True)
    for _ in range(700):
        source.choices(actions, weights)[0]()
        hand.stats()
        assert hand.scheduler.load().running_samples <= 5
    hand.resume()
    hand.drain()
    stats = hand.stats()
    assert stats["pending"] == stats["running"] == hand.scheduler.load().running_samples == 0
    assert stats["accepted"] == len(accepted) == sum(ends.values()) and set(ends.values()) == {1}
    outcomes = Counter("cancelled" if one.cancelled() else type(one.exception(0)).__name__ for one in accepted)
    assert outcomes["NoneType"] == stats["completed"]
    assert outcomes.keys() >= {"NoneType", "CancelledRequestError", "DeadlineExceededError", "EngineError"}
    assert refused and tasks
    # Nothing is left that would stop the next one.
    (last,) = hand.finish(hand.submit(seed=1))
    assert not isinstance(last, FlowrollError)
