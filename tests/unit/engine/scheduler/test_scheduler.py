"""How requests run beside each other, leave early, wait, and how each of them ends once. Driven by hand, without a thread."""

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import ALL, Hand

from flowroll.engine import BatchLimits, Engine
from flowroll.engine.runner import model_runner
from flowroll.engine.scheduler import Scheduler
from flowroll.engine.scheduler.policy import Watchdog
from flowroll.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    InvalidRequestError,
    PausedError,
    QueueFullError,
    ShuttingDownError,
)


def test_samples_of_different_requests_share_steps_and_join_and_leave_between_them(hand: Hand) -> None:
    first, second = hand.begin({"num_inference_steps": 3}, {"num_inference_steps": 2, "sde_type": "cps"})
    hand.step()
    (third,) = hand.begin({"num_inference_steps": 2, "rollout": False})
    hand.finish(first, second, third)
    # Steps: {1, 2}, {1, 2, 3}, {1, 3}.
    assert hand.scheduler.load().batches == {2: 2, 3: 1}
    assert hand.scheduler.load().steps == 7
    assert hand.stats() == {"accepted": 3, "completed": 3, "failed": 0, "pending": 0, "running": 0}


def test_only_samples_of_equal_keys_share_and_lanes_take_turns(hand: Hand) -> None:
    hand.finish(*hand.begin({"seed": 1}, {"seed": 2}, {"height": 64}))
    assert hand.scheduler.load().batches == {2: 4, 1: 4}


def test_a_group_is_encoded_once_and_its_samples_share_the_conditioning(hand: Hand) -> None:
    plans: list[Any] = []
    hand.work.before_encode = plans.append
    (group,) = hand.begin({"num_outputs_per_prompt": 4, "guidance_scale": 3.0, **ALL})
    hand.step()
    running = hand.work.samples
    pointers = {id(tensor): tensor.data_ptr() for sample in running for tensor in _env_tensors(sample.conditioning.env)}
    assert len(running) == 4 and len(plans) == 1
    # A positive and a negative embedding, each in one place for all four.
    assert len(set(pointers.values())) == len(pointers) == 2
    (rollouts,) = hand.finish(group)
    assert [rollout.seed for rollout in rollouts] == [1, 2, 3, 4]


def test_what_is_in_memory_stays_within_the_limits_and_a_large_sample_runs_alone(engine: Engine) -> None:
    hand = Hand(engine, max_batch_samples=2, max_running_samples=3, max_running_pixels=3 * 32 * 32)
    requests = [hand.submit(num_outputs_per_prompt=4), hand.submit(height=128, width=128), hand.submit(seed=9)]
    seen: set[tuple[int, int]] = set()

    def look(*_: object) -> None:
        plans = [sample.conditioning.plan for sample in hand.work.samples]
        seen.add((hand.scheduler.load().running_samples, sum(p.geometry.height * p.geometry.width for p in plans)))

    hand.work.before_decode = look
    while not all(request.done() for request in requests):
        hand.encode()
        hand.step()
        look()
        hand.decode()
    assert max(samples for samples, _ in seen) == 3
    assert {pixels for _, pixels in seen if pixels > 3 * 32 * 32} == {128 * 128}
    assert all(samples == 1 for samples, pixels in seen if pixels == 128 * 128)
    assert max(hand.scheduler.load().batches) == 2


def test_samples_start_in_the_order_of_acceptance_whatever_their_shape(engine: Engine) -> None:
    hand = Hand(engine, max_running_samples=1)
    order: list[int] = []
    hand.work.before_decode = lambda sample: order.append(sample.seed)
    hand.finish(*[hand.submit(seed=seed, height=height) for seed, height in ((1, 32), (2, 64), (3, 32), (4, 64))])
    assert order == [1, 2, 3, 4]


def test_a_rare_shape_ends_although_a_stream_of_another_never_does(engine: Engine) -> None:
    hand = Hand(engine, max_batch_samples=2, max_running_samples=4)
    stream = [hand.submit(seed=seed) for seed in range(6)]
    rare = hand.submit(height=64, seed=100)
    turns = 0
    while not rare.done():
        stream.append(hand.submit(seed=1000 + turns))
        hand.encode()
        hand.step()
        hand.decode()
        turns += 1
        # It starts after the six before it, two by two, and then has every other turn.
        assert turns <= 3 * 4 + 2 * 4 + 8
    assert not stream[-1].done()


@pytest.mark.parametrize("when", ["waiting", "encoded", "stepping", "decoding"])
def test_a_cancelled_request_leaves_at_once_and_the_others_keep_their_bits(hand: Hand, when: str) -> None:
    other = hand.submit(seed=5, **ALL)
    if when == "waiting":
        meant = hand.submit(seed=6)
    elif when == "encoded":
        (meant,) = hand.begin({"seed": 6})
    else:
        (meant,) = hand.begin({"seed": 6, "num_inference_steps": 3, "num_outputs_per_prompt": 2})
        hand.step(2 if when == "stepping" else 3)
    hand.cancel(meant)
    assert isinstance(meant.exception(0), CancelledRequestError)
    hand.cancel(meant)
    before = hand.scheduler.load().steps
    ((rollout,),) = hand.finish(other)
    hand.drain()
    steps_of_other = 4 if when in ("waiting", "encoded") else 4 - (2 if when == "stepping" else 3)
    assert hand.scheduler.load().steps - before == steps_of_other
    assert_same_bits(rollout, hand.alone(seed=5, **ALL)[0])
    assert hand.stats() == {"accepted": 2, "completed": 1, "failed": 1, "pending": 0, "running": 0}
    assert hand.scheduler.load().failures == {"cancelled": 1}
    assert hand.scheduler.load().running_samples == 0


def test_abort_ends_the_requests_of_an_id_or_all(hand: Hand) -> None:
    ids = ["mine", "yours", "mine", "theirs"]
    requests = [hand.submit(request_id=name) for name in ids]
    hand.encode()
    assert hand.abort("nobody") == 0
    assert hand.abort("mine") == 2
    assert [request.done() for request in requests] == [True, False, True, False]
    assert hand.abort(None) == 2
    hand.drain()
    assert all(isinstance(request.exception(0), CancelledRequestError) for request in requests)
    assert hand.stats()["failed"] == 4


def test_a_future_that_is_cancelled_while_it_waits_is_never_taken_up(hand: Hand) -> None:
    first, second = hand.submit(), hand.submit()
    plans: list[Any] = []
    hand.work.before_encode = plans.append
    assert not first.cancel() and second.cancel()
    hand.step()
    assert hand.stats()["pending"] == 0
    hand.finish(first)
    with pytest.raises(CancelledError):
        second.result(0)
    assert len(plans) == 1 and hand.stats()["failed"] == 1


def test_a_deadline_ends_a_request_wherever_it_is(engine: Engine) -> None:
    hand = Hand(engine, max_batch_samples=1, max_running_samples=1)
    running = hand.submit(timeout_s=10.0)
    ready = hand.submit(timeout_s=20.0)
    waiting = hand.submit(timeout_s=30.0)
    patient = hand.submit()
    while hand.encode():
        pass
    hand.step(2)
    assert hand.scheduler.loop.idle_s() == 10.0
    hand.clock.now_s += 9.9
    hand.step()
    assert not running.done()
    for late, request in ((0.1, running), (10.0, ready), (10.0, waiting)):
        hand.clock.now_s += late
        hand.step()
        assert isinstance(request.exception(0), DeadlineExceededError), late
    assert len(hand.finish(patient)[0]) == 1
    assert hand.scheduler.load().failures == {"deadline_exceeded": 3}
    assert hand.scheduler.loop.idle_s() is None


def test_a_full_queue_refuses_until_there_is_room(hand: Hand) -> None:
    first = hand.submit(max_waiting=1)
    hand.submit(max_waiting=1)
    with pytest.raises(QueueFullError, match="1 waiting"):
        hand.submit(max_waiting=1)
    hand.encode()
    hand.submit(max_waiting=1)
    hand.finish(first)
    assert hand.stats()["accepted"] == 3


def test_a_pause_refuses_new_requests_holds_those_that_wait_and_lets_the_others_finish(hand: Hand) -> None:
    running, waiting = hand.submit(), hand.submit()
    hand.pause("finish")
    with pytest.raises(PausedError):
        hand.submit()
    assert len(hand.finish(running)[0]) == 1
    hand.drain()
    assert not waiting.done() and hand.stats()["pending"] == 1
    assert hand.scheduler.load().is_paused
    hand.resume()
    assert len(hand.finish(waiting)[0]) == 1


def test_a_freeze_stops_between_two_steps_and_changes_no_bit(hand: Hand) -> None:
    (frozen,) = hand.begin({**ALL, "seed": 5})
    hand.step(2)
    hand.pause("freeze")
    hand.drain()
    assert hand.scheduler.load().steps == 2 and not frozen.done()
    hand.clock.now_s += 1e6
    assert hand.scheduler.is_progressing()
    with pytest.raises(PausedError, match="frozen"):
        hand.exclusive(lambda: None).result(0)
    hand.resume()
    ((rollout,),) = hand.finish(frozen)
    assert_same_bits(rollout, hand.alone(seed=5, **ALL)[0])


def test_an_exclusive_action_that_drains_waits_for_what_runs_and_goes_before_what_waits(hand: Hand) -> None:
    running = hand.submit()
    hand.encode()
    hand.step()
    waiting = hand.submit()  # in the encoder already
    behind = hand.submit()
    seen: list[tuple[bool, bool, bool]] = []
    done = hand.exclusive(lambda: seen.append((running.done(), waiting.done(), behind.done())) or "done")
    after = hand.submit()
    hand.finish(running, waiting, behind, after)
    assert done.result(0) == "done"
    assert seen == [(True, True, False)]


@pytest.mark.parametrize("stage", ["encode", "step", "decode"])
def test_an_exclusive_action_that_aborts_has_running_requests_done_again_wholly(hand: Hand, stage: str) -> None:
    """The model is changed in between: no trajectory may see both."""
    fields = {**ALL, "seed": 5, "num_outputs_per_prompt": 2, "num_inference_steps": 2}
    request = hand.submit(**fields)
    others = hand.submit(seed=9)
    if stage != "encode":
        hand.encode()
        hand.step(1 if stage == "step" else 2)
    bias = hand.engine._model.transformer.all_final_layer["2-1"].linear.bias
    old = bias.data.clone()
    try:
        done = hand.exclusive(lambda: bias.data.add_(0.5), mode="abort")
        assert hand.stats()["running"] == 0 and hand.stats()["pending"] == 2
        group, _ = hand.finish(request, others)
        assert done.done()
        expected = hand.alone(**fields)
    finally:
        bias.data.copy_(old)
    for ours, alone in zip(group, expected, strict=True):
        assert_same_bits(ours, alone)
    before = hand.alone(**fields)
    assert not torch.equal(before[0].image, group[0].image)
    assert hand.stats() == {"accepted": 2, "completed": 2, "failed": 0, "pending": 0, "running": 0}


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_an_exclusive_action_waits_for_what_still_works_for_an_aborted_request(hand: Hand, stage: str) -> None:
    """The text encoder and the VAE are the model too."""
    request = hand.submit(num_inference_steps=1)
    if stage == "decode":
        hand.encode()
        hand.step()
    done = hand.exclusive(lambda: None, mode="abort")
    hand.step()
    assert not done.done()
    getattr(hand, stage)()
    hand.step()
    assert done.done()
    assert len(hand.finish(request)[0]) == 1


def test_requests_that_were_put_back_go_before_those_that_waited(engine: Engine) -> None:
    hand = Hand(engine, max_batch_samples=1, max_running_samples=1)
    order: list[int] = []
    requests = hand.begin(*[{"seed": seed} for seed in (1, 2)])
    requests.append(hand.submit(seed=3))
    hand.pause("finish")
    hand.exclusive(lambda: None, mode="abort")
    hand.work.before_decode = lambda sample: order.append(sample.seed)
    hand.resume()
    requests.append(hand.submit(seed=4))
    hand.finish(*requests)
    assert order == [1, 2, 3, 4]


def test_nothing_starts_in_a_freeze(hand: Hand) -> None:
    hand.begin({})
    hand.pause("freeze")
    hand.drain()
    assert hand.scheduler.load().running_samples == 0


def test_an_exclusive_action_that_aborts_goes_through_a_freeze(hand: Hand) -> None:
    (request,) = hand.begin({"seed": 5})
    hand.step()
    hand.pause("freeze")
    done = hand.exclusive(lambda: 7, mode="abort")
    hand.drain()
    assert done.result(0) == 7 and not request.done()
    hand.resume()
    assert len(hand.finish(request)[0]) == 1


def test_what_is_done_between_steps_does_not_wait_for_requests(hand: Hand) -> None:
    (request,) = hand.begin({})
    hand.step()
    asked = hand.between_steps(lambda: request.done())
    hand.step()
    assert asked.result(0) is False
    failing = hand.between_steps(lambda: 1 // 0)
    hand.step(2)
    with pytest.raises(ZeroDivisionError):
        failing.result(0)
    assert len(hand.finish(request)[0]) == 1


def test_nothing_starts_while_a_push_is_incomplete_not_even_what_came_before_it(hand: Hand) -> None:
    running = hand.submit(num_outputs_per_prompt=3)
    hand.encode()
    hand.step()
    seen: list[str] = []

    def scoring() -> Any:
        seen.append("score")
        return iter(())

    hand.scheduler.hold_starts(True)
    waiting = hand.submit()
    first = hand.exclusive(lambda: seen.append("first"))
    # As a score that was accepted just before the push.
    score = hand.between_steps(scoring, request_id="score")
    picture = hand.between_steps(lambda: 7)
    # All samples of what was running had the old weights.
    assert len(hand.finish(running)[0]) == 3
    hand.drain()
    assert picture.result(0) == 7
    assert first.done() and seen == ["first"] and not waiting.done() and not score.done()
    assert hand.exclusive(lambda: seen.append("second")) is not None
    hand.scheduler.hold_starts(False)
    hand.drain()
    assert seen == ["first", "second", "score"] and waiting.done() and score.done()


def test_a_stream_of_what_is_done_between_steps_stops_neither_samples_nor_changes_of_the_model(hand: Hand) -> None:
    (request,) = hand.begin({"num_inference_steps": 4})
    change = None

    def stream() -> None:
        hand.between_steps(stream)

    stream()
    stream()
    for turn in range(60):
        if turn == 6:
            assert hand.scheduler.load().steps == 3
            change = hand.exclusive(lambda: request.done())
        hand.step()
        hand.decode()
    assert change is not None and change.result(0) is True


def test_stop_ends_everything_once_and_refuses_what_comes(hand: Hand) -> None:
    requests = [hand.submit(seed=seed) for seed in range(3)]
    hand.encode()
    hand.step()
    task = hand.exclusive(lambda: None)
    end = ShuttingDownError("the engine must run, got its end; go elsewhere.")
    hand.scheduler.stop(end)
    told = [request.exception(0) for request in (*requests, task)]
    assert [str(error) for error in told] == [str(end)] * 4 and {type(error) for error in told} == {ShuttingDownError}
    # Each its own: whoever asks a future raises what is in it, and adds frames to it.
    assert len({id(error) for error in (*told, end)}) == 5
    for call in (hand.submit, hand.exclusive, hand.between_steps):
        with pytest.raises(ShuttingDownError):
            call(lambda: None) if call != hand.submit else call()
    hand.drain()
    assert hand.stats()["failed"] == 3


def test_refusals_keep_nothing_of_who_was_refused(hand: Hand) -> None:
    hand.scheduler.stop(ShuttingDownError("the engine must run, got its end; go elsewhere."))
    for _ in range(100):
        with pytest.raises(ShuttingDownError):
            hand.submit()
    stopped = hand.scheduler.stopped
    assert stopped is not None and stopped.__traceback__ is None and stopped.__context__ is None


def test_the_stages_of_a_request_follow_each_other_without_a_gap(hand: Hand) -> None:
    def passing(seconds: float) -> Any:
        def passes(*_: object) -> None:
            hand.clock.now_s += seconds

        return passes

    hand.work.before_encode, hand.work.before_decode = passing(2.0), passing(8.0)
    request = hand.submit(num_inference_steps=2)
    hand.clock.now_s += 0.5
    hand.encode()
    hand.clock.now_s += 1.0
    hand.step()
    hand.clock.now_s += 4.0
    hand.finish(request)
    timing = request.timing
    # Taken up at once, so that waiting for the encoder counts as encoding.
    assert (timing.queue, timing.encode, timing.denoise, timing.decode) == (1.0, 2.5, 4.0, 8.0)
    assert hand.scheduler.load().stage_s == {"queue": 1.0, "encode": 2.5, "denoise": 4.0, "decode": 8.0}


def test_retry_after_follows_from_the_work_that_is_ahead_and_how_fast_it_is_done(hand: Hand) -> None:
    first = hand.submit()
    hand.clock.now_s += 4.0
    hand.finish(first)
    # One sample takes 4 s: half of the 40 s of what runs, and all of the 80 s of what waits, are ahead.
    hand.submit(num_outputs_per_prompt=10)
    hand.submit(num_outputs_per_prompt=20)

    def refused_s() -> float:
        with pytest.raises(QueueFullError) as refused:
            hand.submit(max_waiting=1)
        return refused.value.retry_after_s

    # Whoever is refused comes back when half of it is done, a little earlier by chance; the next one after that.
    assert 0.75 * 50.0 <= refused_s() <= 50.0
    assert 0.75 * 54.0 <= refused_s() <= 54.0
    hand.abort(None)
    hand.submit(num_outputs_per_prompt=2)
    hand.submit(max_waiting=4)
    # There was room meanwhile, which ends the appointments: half of 8 s of what runs, and 4 s of what waits, are ahead.
    assert 0.75 * 4.0 <= refused_s() <= 4.0


def test_before_anything_has_ended_retry_after_follows_from_how_long_something_waits(hand: Hand) -> None:
    hand.submit()
    hand.submit()
    hand.clock.now_s += 30.0
    with pytest.raises(QueueFullError) as refused:
        hand.submit(max_waiting=1)
    assert 0.75 * 15.0 <= refused.value.retry_after_s <= 15.0


def test_requests_count_as_stuck_only_far_beyond_what_recent_work_took(hand: Hand) -> None:
    assert not hand.scheduler.is_progressing()
    request = hand.submit()
    hand.clock.now_s += 1000.0
    assert hand.scheduler.is_progressing()  # nothing to compare with
    hand.clock.now_s += 1000.0
    assert not hand.scheduler.is_progressing()
    hand.finish(request)
    hand.submit()
    hand.clock.now_s += 59.0
    assert hand.scheduler.is_progressing()
    hand.clock.now_s += 2.0
    assert not hand.scheduler.is_progressing()


def test_a_first_step_of_two_samples_may_take_longer_than_those_of_one(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model_runner.forward

    def slow(batch: Any) -> Any:
        hand.clock.now_s += 8.0
        return forward(batch)

    monkeypatch.setattr(model_runner, "forward", slow)
    hand.finish(hand.submit())
    healthy: list[bool] = []

    def very_slow(batch: Any) -> Any:
        # Ten times eight seconds, and four times that for twice as many pixels.
        for seconds in (319.0, 1.0):
            hand.clock.now_s += seconds
            healthy.append(hand.scheduler.is_progressing())
        return forward(batch)

    monkeypatch.setattr(model_runner, "forward", very_slow)
    hand.begin({"num_outputs_per_prompt": 2})
    hand.step()
    assert healthy == [True, False]


@pytest.mark.parametrize(
    ("pixels", "allowed_s"),
    [
        # As large as what was measured, or smaller: ten times the slowest piece.
        (512, 80.0),
        (1024, 80.0),
        # Twice as large: four times as long. Much larger: as if nothing had been measured.
        (2048, 320.0),
        (10**6, 1800.0),
    ],
)
def test_what_is_larger_than_all_recent_work_may_take_longer(pixels: int, allowed_s: float) -> None:
    watchdog = Watchdog()
    for seconds, running in ((0.5, 0), (8.0, 1024), (2.0, 256)):
        watchdog.note_piece(100.0 - seconds, 100.0, running_pixels=running)
    assert not watchdog.is_stuck(0.0, 100.0 + allowed_s - 0.1, pixels)
    assert watchdog.is_stuck(0.0, 100.0 + allowed_s, pixels)


def test_a_request_runs_with_the_thread_count_of_its_caller_and_shares_with_its_like_alone(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    stepped: set[tuple[int, int]] = set()
    forward = model_runner.forward

    def counting(batch: Any) -> Any:
        stepped.add((len(batch), torch.get_num_threads()))
        assert not torch.is_grad_enabled()
        return forward(batch)

    monkeypatch.setattr(model_runner, "forward", counting)
    hand.work.before_encode = hand.work.before_decode = lambda *_: counts.append(torch.get_num_threads())
    before = torch.get_num_threads()
    try:
        one = hand.begin({"seed": 1}, {"seed": 2})
        torch.set_num_threads(2)
        two = hand.begin({"seed": 3})
        hand.finish(*one, *two)
    finally:
        torch.set_num_threads(before)
    assert sorted(counts) == [1, 1, 1, 1, 2, 2]
    assert stepped == {(2, 1), (1, 2)}
    assert hand.scheduler.load().batches == {2: 4, 1: 4}


def test_threads_end_with_an_engine_that_nobody_holds_any_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set(threading.enumerate())
    scheduler = Scheduler(Hand(engine).work, BatchLimits())
    scheduler.start()
    started = set(threading.enumerate()) - threads
    assert len(started) == 3 and scheduler.is_alive
    gone = weakref.ref(scheduler)
    del scheduler
    deadline = time.monotonic() + 30.0
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        gc.collect()  # a thread that looks at this moment holds it
        time.sleep(0.01)
    assert gone() is None and not any(thread.is_alive() for thread in started)


def test_a_defect_of_the_loop_ends_every_request_instead_of_leaving_it_for_ever(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hand = Hand(engine, threads=True)

    def defect(*_: object) -> None:
        raise AssertionError("an invariant broke")

    monkeypatch.setattr(hand.scheduler.loop, "_decode", defect)
    request = hand.submit()
    hand.scheduler.start()
    with pytest.raises(Exception, match="an invariant broke"):
        request.result(30.0)
    assert hand.scheduler.halt(30.0)
    assert not hand.scheduler.is_alive and "cannot go on" in caplog.text


@pytest.mark.parametrize("name", ["max_batch_samples", "max_running_samples", "max_running_pixels"])
def test_limits_are_at_least_1(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be >= 1"):
        BatchLimits(**{name: 0})


def _env_tensors(env: Any) -> list[torch.Tensor]:
    branches = (env.pos_cond_kwargs, env.neg_cond_kwargs or {})
    return [value for branch in branches for value in branch.values() if isinstance(value, torch.Tensor)]
