"""The sequence of versions, and what compares by it."""

from hypothesis import given
from hypothesis import strategies as st
from pytest import mark, raises

from flowroll.engine.weights.versions import MAX_NAMES, VersionState, WeightVersions
from flowroll.errors import InvalidRequestError, OutdatedWeightsError


def versions_of(*names: str) -> WeightVersions:
    versions = WeightVersions()
    for name in names:
        versions.advance(name)
    return versions


@given(st.lists(st.sampled_from(["1", "2", "7", "a", "b"]), max_size=8))
def test_numbers_only_grow_and_belong_to_the_newest_weights_of_a_name(names: list[str]):
    versions, seen = WeightVersions(), [0]
    for name in names:
        is_same = name == versions.current
        versions.advance(name)
        state = versions.state
        assert state.number == state.newest == seen[-1] + (not is_same) == state.number_of(name)
        seen.append(state.number)


def test_an_older_version_is_not_enough_for_a_name_that_came_after_it():
    state = versions_of("one", "two").state
    assert state.is_enough("two", 2, "one") and not state.is_enough("one", 1, "two")
    assert not state.is_enough("two", 2, "never")


def test_names_are_remembered_with_a_bound():
    numbers = {f"v{number}": number for number in range(MAX_NAMES)}
    last = f"v{MAX_NAMES - 1}"
    state = VersionState(current=last, number=MAX_NAMES - 1, newest=MAX_NAMES - 1, highest=0, numbers=numbers).after("next")
    assert len(state.numbers) == MAX_NAMES and state.number_of("v0") == -1 and state.number_of("next") == MAX_NAMES


@mark.parametrize(
    ("most", "version", "coming", "is_met"),
    [
        (None, "one", 9, True),
        (0, "two", 0, True),
        (0, "two", 1, False),
        (1, "two", 1, True),
        (0, "one", 0, False),
        (1, "one", 0, True),
        (1, "one", 1, False),
        (100, "never", 0, True),
        (2, "never", 0, False),
    ],
)
def test_age_counts_the_versions_between_and_those_that_wait(most: int | None, version: str, coming: int, is_met: bool):
    versions = versions_of("one", "two")
    if is_met:
        versions.demand_recent(version, most, coming=coming)
    else:
        with raises(OutdatedWeightsError, match=f"at most {most} versions behind"):
            versions.demand_recent(version, most, coming=coming)


def test_a_given_name_is_checked():
    with raises(InvalidRequestError):
        WeightVersions().state.following("")
