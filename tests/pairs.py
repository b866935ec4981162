"""Covering every pair of options instead of every product of them.

A fault that needs three particular options at once is not looked for by a table of pairs; the proofs under the marks `slow`
and `proof` look further.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pytest

from flowroll.families import FAMILIES

T = TypeVar("T")
DTYPES = ("float32", "bfloat16")
# One row for each family, and both dtypes among them: for promises that the table of proofs has for every pair of the two.
FAMILY_WITH_DTYPE = tuple((family, DTYPES[number % 2]) for number, family in enumerate(FAMILIES))


def dealt(**columns: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with the rows of `deal`."""
    return pytest.mark.parametrize(tuple(columns), deal(*columns.values()))


def deal(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows in which every value comes at least once: the columns go round, each at its own length."""
    longest = max(map(len, columns))
    return [tuple(values[number % len(values)] for values in columns) for number in range(longest)]


def rest_slow(rows: Sequence[Any], *, later: int | None = None) -> list[Any]:
    """The rows, mappings or dataclasses, as parameters; those of which every value has come earlier are marked `slow`.

    So are, if that is given, all rows from this one on.
    """
    seen: set[tuple[str, str]] = set()
    found = []
    for number, row in enumerate(rows):
        values = row if isinstance(row, Mapping) else dataclasses.asdict(row)
        is_new = not set(values.items()) <= seen and (later is None or number < later)
        found.append(pytest.param(row, id="-".join(values.values()), marks=[] if is_new else [pytest.mark.slow]))
        seen.update(values.items())
    return found


def paired(**columns: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with rows in which any two values of different columns meet: `paired(name=NAMES, cfg=BOTH)`."""
    rows = pairs(**columns)
    return pytest.mark.parametrize(tuple(columns), [tuple(row.values()) for row in rows])


def pairs(**columns: Sequence[T]) -> list[dict[str, T]]:
    """Few rows in which every value of a column meets every value of every other column; the same rows at every call."""
    open_pairs = {((a, x), (b, y)): None for a, b in itertools.combinations(columns, 2) for x in columns[a] for y in columns[b]}
    used: Counter[tuple[str, T]] = Counter()
    rows = []
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for name in [name for name in columns if name not in row]:
            row[name] = _most_new(open_pairs, used, row, name, columns)
        rows.append({name: row[name] for name in columns})
        used.update(rows[-1].items())
        for pair in itertools.combinations(rows[-1].items(), 2):
            open_pairs.pop(pair, None)
    return rows


def _most_new(
    open_pairs: Mapping[Any, None], used: Counter[Any], row: Mapping[str, Any], name: str, columns: Mapping[str, Sequence[Any]]
) -> Any:
    """The value that meets the most of the row's values for the first time; the least used one where several do."""

    def gain(value: Any) -> tuple[int, int]:
        full = {**row, name: value}
        ordered = [(column, full[column]) for column in columns if column in full]
        return sum(pair in open_pairs for pair in itertools.combinations(ordered, 2)), -used[name, value]

    return max(columns[name], key=gain)
