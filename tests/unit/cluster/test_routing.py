"""Who runs what. None of this needs Ray."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowroll.cluster.routing import Router, soonest
from flowroll.engine.weights.versions import VersionState, WeightVersions
from flowroll.errors import OutdatedWeightsError, QueueFullError, ShuttingDownError


def advance(router: Router, name: str) -> int:
    """Makes a version the newest one of the fleet, and returns its number."""
    router.versions.advance(name)
    return router.versions.state.number


def router_of(*ids: str, batch: int = 16, max_staleness: int | None = None) -> Router:
    router = Router(WeightVersions(), max_batch_samples=batch, max_staleness=max_staleness)
    for name in ids:
        router.join(name, version="0", number=0)
    return router


def test_it_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import flowroll.cluster.routing, flowroll.cluster.updates"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_ray_the_rest_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None; from flowroll import cluster; cluster.serve"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'flowroll[ray]'" in ended.stderr


def test_the_least_busy_replica_by_image_steps_is_next():
    router = router_of("a", "b")
    (large,) = router.place(1, 50)
    small = [router.place(1, 10)[0] for _ in range(4)]
    assert large.replica == "a" and {part.replica for part in small} == {"b"}
    router.release(large)
    assert router.place(1, 1)[0].replica == "a"


def test_idle_replicas_take_turns():
    router = router_of("a", "b", "c")
    seen = []
    for _ in range(6):
        (part,) = router.place(1, 10)
        seen.append(part.replica)
        router.release(part)
    assert seen == ["a", "b", "c"] * 2


def test_a_group_stays_together_unless_it_is_larger_than_a_batch():
    router = router_of("a", "b", "c", batch=8)
    assert [len(part.samples) for part in router.place(8, 80)] == [8]
    parts = router.place(20, 200)
    assert [part.samples for part in parts] == [range(6), range(6, 13), range(13, 20)]
    assert len({part.replica for part in parts}) == 3
    assert sum(part.image_steps for part in parts) == 200


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 6), st.integers(1, 50))
def test_parts_are_the_samples_in_their_order_once(num_samples: int, batch: int, num_replicas: int, steps: int):
    router = router_of(*map(str, range(num_replicas)), batch=batch)
    parts = router.place(num_samples, num_samples * steps)
    assert [sample for part in parts for sample in part.samples] == list(range(num_samples))
    assert len({part.replica for part in parts}) == len(parts) == min(-(-num_samples // batch), num_replicas)
    for part in parts:
        router.release(part)
    assert all(one.image_steps == one.num_requests == 0 for one in router.replicas)


def test_replicas_that_were_asked_in_vain_are_left_out():
    router = router_of("a", "b")
    assert router.place(1, 1, but={"a"})[0].replica == "b"
    assert router.place(1, 1, but={"a", "b"}) == []


def test_without_a_replica_the_caller_is_told_when_to_come_again():
    router = router_of("a")
    router.leave("a")
    with pytest.raises(QueueFullError, match="replica") as raised:
        router.place(1, 1)
    assert raised.value.retry_after_s > 0


def test_a_minimum_leaves_older_replicas_out():
    router = router_of("a", "b")
    number = advance(router, "1")
    router.set_version("b", "1", number)
    assert {router.place(1, 1, minimum="1")[0].replica for _ in range(5)} == {"b"}
    with pytest.raises(OutdatedWeightsError, match="version 2"):
        router.place(1, 1, minimum="2")


def test_staleness_leaves_replicas_out_until_they_have_caught_up():
    router = router_of("a", "b", max_staleness=1)
    for name in ("one", "two"):
        number = advance(router, name)
        router.set_version("b", name, number)
        if name == "one":
            assert {part.replica for _ in range(4) for part in router.place(1, 1)} == {"a", "b"}
    assert {part.replica for _ in range(4) for part in router.place(1, 1)} == {"b"}
    router.leave("b")
    with pytest.raises(OutdatedWeightsError, match="2 behind"):
        router.place(1, 1)


def test_a_request_may_allow_less_age_than_the_fleet():
    router = router_of("a", "b", max_staleness=3)
    for name in ("one", "two"):
        router.set_version("b", name, advance(router, name))
    assert {router.place(1, 1, max_staleness=1)[0].replica for _ in range(4)} == {"b"}
    assert {router.place(1, 1, max_staleness=2)[0].replica for _ in range(9)} == {"a", "b"}


def test_a_replica_that_has_exchanged_makes_the_others_older():
    """While weights are exchanged on one replica after the other, the fleet's newest version is that of the first."""
    router = router_of("a", "b")
    router.set_version("b", "1", 1)
    assert {router.place(1, 1, max_staleness=0)[0].replica for _ in range(4)} == {"b"}
    router.leave("b")
    assert router.place(1, 1, max_staleness=0)[0].replica == "a"


def test_a_fleet_that_lost_its_weights_refuses_who_allows_no_age():
    state = VersionState(current="0", number=0, newest=7, highest=7, numbers={"0": 0, "7": 7})
    router = Router(WeightVersions(state), max_batch_samples=4)
    router.join("a", version="0", number=0)
    router.place(1, 1)
    with pytest.raises(OutdatedWeightsError, match="7 behind") as raised:
        router.place(1, 1, max_staleness=6)
    assert raised.value.field == "max_staleness"
    with pytest.raises(OutdatedWeightsError):
        router.place(1, 1, minimum="7")


def test_versions_that_a_client_sees_never_run_backwards():
    """A client that demands the version of its last answer, while replicas change one after the other."""
    drawn = random.Random(0)
    router = router_of("a", "b", "c")
    seen, at = "0", {name: 0 for name in "abc"}
    for _ in range(500):
        if drawn.random() < 0.2:
            number = advance(router, f"v{router.versions.state.number + 1}")
            at = dict.fromkeys(drawn.sample("abc", 2), number)
            for name, reached in at.items():
                router.set_version(name, f"v{reached}", reached)
        (part,) = router.place(1, 1, minimum=seen)
        (replica,) = [one for one in router.replicas if one.id == part.replica]
        assert replica.number >= (0 if seen == "0" else int(seen[1:]))
        seen = replica.version
        router.release(part)


def test_of_full_replicas_the_soonest_counts():
    full = [QueueFullError("full", retry_after_s=seconds) for seconds in (5.0, 2.0, 9.0)]
    assert soonest([ShuttingDownError("stops"), *full]) is full[1]
    assert isinstance(soonest([ShuttingDownError("stops")]), ShuttingDownError)
