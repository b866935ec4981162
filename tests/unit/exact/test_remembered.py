"""What is remembered of shared forwards: little, and no more than a bound, whatever is asked."""

import pytest
import torch
from tests.unit.exact.shared import Sharing, random_inputs

from flowroll.exact import sharing


def test_no_more_analyses_than_the_bound_are_kept_and_the_used_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_ANALYSES", 3)
    shared = Sharing(lambda x: torch.sigmoid(x) * 2)
    for columns in (4, 5, 6):
        assert shared.is_exact(random_inputs(2, 1, columns))
    assert len(shared.analyses) == 3
    (known,) = shared.forwards._known.values()
    first, second, _ = list(known.notes)
    assert shared.is_exact(random_inputs(2, 1, 4)) and shared.is_exact(random_inputs(2, 1, 7))
    assert len(shared.analyses) == 3 and first in known.notes and second not in known.notes


def test_kinds_that_cannot_be_shared_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_ANALYSES", 3)
    shared = Sharing(lambda x: x * len(x))
    for columns in range(4, 12):
        assert shared.is_exact(random_inputs(2, 1, columns))
    (known,) = shared.forwards._known.values()
    assert list(known.notes.values()) == [None] * 3


def test_equal_notes_of_a_forward_are_one_object() -> None:
    def blocks(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = torch.cumsum(torch.sigmoid(x), dim=-1)
        return x

    shared = Sharing(blocks)
    assert shared.is_exact(random_inputs(2, 1, 8))
    (notes,) = shared.analyses
    assert len(notes.steps) >= 40 and len({id(step) for step in notes.steps}) <= 4
