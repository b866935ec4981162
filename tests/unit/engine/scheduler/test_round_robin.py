"""Fairness: whose step is next."""

import random
from typing import TypeVar

from flowroll.engine.scheduler.policy import RoundRobin

T = TypeVar("T")


def next_of(turns: RoundRobin[T], most: int) -> list[T]:
    """The next of at most so many, whatever the lane."""
    return turns.next(lambda key: most)[1]


def test_lanes_take_turns_and_a_new_lane_joins_at_the_end() -> None:
    turns: RoundRobin[str] = RoundRobin()
    for key, item in (("a", "a1"), ("b", "b1"), ("a", "a2")):
        turns.add(key, item)
    assert next_of(turns, 8) == ["a1", "a2"]
    turns.add("c", "c1")
    assert [next_of(turns, 8) for _ in range(4)] == [["b1"], ["a1", "a2"], ["c1"], ["b1"]]


def test_in_a_lane_the_oldest_go_first() -> None:
    turns: RoundRobin[int] = RoundRobin()
    for item in range(5):
        turns.add("a", item)
    assert next_of(turns, 2) == [0, 1]
    assert next_of(turns, 2) == [0, 1]
    turns.remove("a", 0)
    turns.add("a", 5)
    assert next_of(turns, 3) == [1, 2, 3]


def test_a_lane_that_was_emptied_joins_anew_at_the_end() -> None:
    turns: RoundRobin[str] = RoundRobin()
    for key in ("a", "b"):
        turns.add(key, key)
    turns.remove("a", "a")
    turns.add("a", "again")
    assert [next_of(turns, 1) for _ in range(3)] == [["b"], ["again"], ["b"]]
    turns.remove("a", "again")
    turns.remove("b", "b")
    assert next_of(turns, 1) == [] and len(turns) == 0 and list(turns) == []


def test_a_stream_of_ever_new_shapes_does_not_starve_an_old_one() -> None:
    turns: RoundRobin[int] = RoundRobin()
    turns.add("old", -1)
    waited, ran = 0, 0
    for number in range(100):
        # Two new shapes of one step each arrive in every turn.
        for item in (2 * number, 2 * number + 1):
            turns.add(item, item)
        batch = next_of(turns, 4)
        if batch == [-1]:
            waited, ran = 0, ran + 1
            continue
        turns.remove(batch[0], batch[0])
        waited += 1
        # No more than stood before it when it last ran.
        assert waited <= 2 * (number + 1)
    assert ran >= 5


def test_every_sample_runs_within_a_round_once_it_is_among_the_oldest_of_its_lane() -> None:
    source = random.Random(0)
    turns: RoundRobin[int] = RoundRobin()
    lanes: dict[int, list[int]] = {}
    since: dict[int, int] = {}
    for number in range(400):
        if source.random() < 0.4:
            key = source.choice([0, 0, 0, 1, 2])
            turns.add(key, number)
            lanes.setdefault(key, []).append(number)
        batch = next_of(turns, 2)
        if not batch:
            continue
        key = next(key for key, lane in lanes.items() if batch[0] in lane)
        assert batch == lanes[key][:2]
        for other in [key for key, lane in lanes.items() if lane]:
            since[other] = 0 if other == key else since.get(other, 0) + 1
            assert since[other] <= 2  # of three lanes
        if source.random() < 0.5:
            done = source.choice(batch)
            turns.remove(key, done)
            lanes[key].remove(done)
            if not lanes[key]:
                since.pop(key, None)


def test_how_many_are_next_may_depend_on_the_lane() -> None:
    turns: RoundRobin[str] = RoundRobin()
    for key, item in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2")):
        turns.add(key, item)
    assert [turns.next(lambda key: {"a": 1, "b": 2}[str(key)])[1] for _ in range(2)] == [["a1"], ["b1", "b2"]]
