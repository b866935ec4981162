"""When refused callers are told to come back."""

import math
import random

import pytest

from flowroll.engine.scheduler.retry import RetrySchedule, Throughput


def test_throughput_is_that_of_the_engine_and_not_of_each_request() -> None:
    """Four requests that share every step take 4 s each, and end a second apart at most."""
    side_by_side = Throughput()
    for _ in range(3):
        side_by_side.note_end(10, busy_since_s=0.0, now_s=4.0)
    side_by_side.note_end(10, busy_since_s=0.0, now_s=4.0)
    assert side_by_side.seconds_per_work == 4.0 / 40


def test_throughput_does_not_count_idle_time() -> None:
    throughput = Throughput()
    assert throughput.seconds_per_work is None
    throughput.note_end(10, busy_since_s=0.0, now_s=5.0)
    throughput.note_end(10, busy_since_s=1000.0, now_s=1005.0)
    # In the middle of what was going on already.
    throughput.note_end(10, busy_since_s=1002.0, now_s=1010.0)
    assert throughput.seconds_per_work == 0.5


def test_refused_callers_come_back_one_after_the_other_as_fast_as_they_can_be_served() -> None:
    schedule = RetrySchedule(draw=lambda: 0.0)
    waits = [schedule.after_s(ahead_s=20.0, own_s=2.0, now_s=0.0) for _ in range(5)]
    # The first one when half of the queue is done.
    assert waits == [10.0, 12.0, 14.0, 16.0, 18.0]
    # Time passes: their appointments are nearer.
    assert schedule.after_s(ahead_s=20.0, own_s=2.0, now_s=6.0) == 14.0
    schedule.clear()
    assert schedule.after_s(ahead_s=20.0, own_s=2.0, now_s=6.0) == 10.0


def test_the_wait_has_bounds_and_callers_of_the_same_moment_are_spread() -> None:
    schedule = RetrySchedule(draw=random.Random(0).random)
    assert schedule.after_s(ahead_s=0.0, own_s=0.0, now_s=0.0) == 1.0
    waits = [schedule.after_s(ahead_s=1e9, own_s=50.0, now_s=0.0) for _ in range(100)]
    assert 450.0 <= min(waits) < 475.0 and 575.0 < max(waits) <= 600.0
    assert all(map(math.isfinite, waits))
    # However many were refused, nobody waits longer for them, once they are gone.
    schedule.clear()
    assert schedule.after_s(ahead_s=4.0, own_s=1.0, now_s=0.0) <= 2.0


@pytest.mark.parametrize("end_s", [300, 1800])
def test_a_queue_under_three_times_its_load_is_never_empty_and_serves_everybody(end_s: int) -> None:
    """A server of one request a second with a queue of 16, by the clock of the test."""
    draw = random.Random(1)
    schedule = RetrySchedule(draw=draw.random)
    now_s, arrivals = 0.0, []
    while now_s < end_s:
        now_s += draw.expovariate(3.0)
        arrivals.append(now_s)
    coming = sorted(arrivals)
    queue = served = refusals = 0
    second, idle = 0, 0
    while coming:
        second += 1
        for moment_s in [each for each in coming if each <= second]:
            coming.remove(moment_s)
            if queue < 16:
                queue += 1
                if queue < 8:
                    schedule.clear()
            else:
                refusals += 1
                coming.append(second + schedule.after_s(ahead_s=float(queue), own_s=1.0, now_s=float(second)))
        idle += not queue
        served += bool(queue)
        queue -= bool(queue)
    assert served + queue == len(arrivals)
    assert idle < 0.05 * second
    assert refusals < 12 * len(arrivals)
