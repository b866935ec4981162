"""Whose rows are whose."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowroll.errors import InvalidRequestError
from flowroll.parallel.shards import MIN_ROWS, ROW_UNIT, check_rows, shard_evenly, shard_rows


@given(total=st.integers(0, 20_000), ranks=st.integers(1, 9))
def test_row_shards_cover_all_rows_in_order_in_whole_units(total: int, ranks: int) -> None:
    shards = [shard_rows(total, index, ranks) for index in range(ranks)]
    if None in shards:
        assert set(shards) == {None}
        assert ranks == 1 or total // ROW_UNIT // ranks * ROW_UNIT < MIN_ROWS
        return
    end = 0
    for shard in shards:
        assert shard is not None and shard.start == end and shard.total == total
        assert shard.start % ROW_UNIT == 0 and shard.size >= MIN_ROWS
        assert shard.is_last == (shard is shards[-1])
        end += shard.size
    assert end == total
    sizes = [shard.size for shard in shards if shard]
    assert max(sizes) - min(sizes) < 2 * ROW_UNIT


def test_an_uneven_sequence_in_three() -> None:
    shard = shard_rows(319, 1, 3)
    assert shard is not None
    assert (shard.sizes, shard.start, shard.size) == ((96, 96, 127), 96, 96)
    assert shard_rows(191, 0, 3) is None
    assert shard_rows(1000, 0, 1) is None


def test_even_shards_of_few_things() -> None:
    assert shard_evenly(2, 1, 2).sizes == (1, 1)
    assert shard_evenly(7, 0, 3).sizes == (3, 2, 2)


def test_more_ranks_than_the_largest_image_has_rows_for_are_refused() -> None:
    check_rows(1, 10)
    check_rows(4, 256)
    with pytest.raises(InvalidRequestError, match="leave 64 of the largest image's 255 tokens to a rank, got 4; use 3"):
        check_rows(4, 255)


@given(total=st.integers(64, 5_000), ranks=st.integers(2, 99))
def test_the_degree_that_a_refusal_names_fits(total: int, ranks: int) -> None:
    try:
        check_rows(ranks, total)
    except InvalidRequestError as refused:
        (named,) = re.findall(r"use (\d+)", refused.message)
        check_rows(int(named), total)
