"""Decides which part of a dimension belongs to which rank."""

from __future__ import annotations

from dataclasses import dataclass

from flowroll.errors import InvalidRequestError

# Products of fewer rows than this can take another kernel than products of more (measured with torch 2.13 on CPU, float32: of
# 1 to 3 rows always, of up to 23 sometimes). Where a rank would get fewer, nothing is sharded and every rank computes all of
# it.
MIN_ROWS = 64
# Shards begin at multiples of this many rows. Element-wise kernels compute the last few elements of a tensor with scalar code,
# whose exp and tanh round otherwise than the vectorised code's; in shards of whole units of 32 rows, every element but the last
# ones of the whole tensor is in a full vector, whatever the width (measured with torch 2.13 on CPU, float32, at a width of
# 170).
ROW_UNIT = 32


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a dimension, in the order of the whole.

    Attributes:
        sizes: The size of every rank's part, in rank order.
        index: The index of this rank's part.
    """

    sizes: tuple[int, ...]
    index: int

    @property
    def start(self) -> int:
        """Where this rank's part begins."""
        return sum(self.sizes[: self.index])

    @property
    def size(self) -> int:
        """The length of this rank's part."""
        return self.sizes[self.index]

    @property
    def is_last(self) -> bool:
        """Whether this rank's part is the end of the dimension."""
        return self.index == len(self.sizes) - 1

    @property
    def total(self) -> int:
        """The length of the whole dimension."""
        return sum(self.sizes)


def shard_evenly(total: int, index: int, ranks: int) -> Shard:
    """Returns this rank's part of `total` items, split as evenly as possible; the first ranks share the remainder."""
    base, rest = divmod(total, ranks)
    return Shard(tuple(base + (rank < rest) for rank in range(ranks)), index)


def shard_rows(total: int, index: int, ranks: int) -> Shard | None:
    """Returns this rank's token rows: whole units, split as evenly as possible; the last rank also gets the remainder.

    Returns:
        The shard; None if all ranks compute all rows, because there is one rank or too few rows.
    """
    units, rest = divmod(total, ROW_UNIT)
    sizes = [count * ROW_UNIT for count in shard_evenly(units, index, ranks).sizes]
    if ranks == 1 or min(sizes) < MIN_ROWS:
        return None
    sizes[-1] += rest
    return Shard(tuple(sizes), index)


def check_rows(ranks: int, most_tokens: int) -> None:
    """Refuses more ranks than the largest image can be split over.

    Args:
        ranks: The number of ranks on the sequence axis.
        most_tokens: The number of image tokens of the largest image that may be requested.

    Raises:
        InvalidRequestError: There are too many ranks; the message names the largest degree that fits.
    """
    if ranks > 1 and shard_rows(most_tokens, 0, ranks) is None:
        fits = max(1, most_tokens // ROW_UNIT // (MIN_ROWS // ROW_UNIT))
        raise InvalidRequestError(
            f"sp must leave {MIN_ROWS} of the largest image's {most_tokens} tokens to a rank, got {ranks}; use {fits} at most.",
            field="sp",
        )
