"""The digest of a guidance branch: the same for the same values, and for no others."""

import pytest
import torch

from flowroll.types import branch_digest

BRANCH = {"embeds": torch.arange(6.0).view(2, 3), "mask": torch.ones(2, dtype=torch.bool), "shapes": [[[1, 2, 3]]]}


def test_a_digest_depends_on_the_values_alone() -> None:
    again = {"shapes": [[[1, 2, 3]]], "mask": torch.ones(2, dtype=torch.bool), "embeds": BRANCH["embeds"].T.contiguous().T}
    assert not again["embeds"].is_contiguous()
    assert branch_digest(again) == branch_digest(BRANCH)


@pytest.mark.parametrize(
    "change",
    [
        {"embeds": torch.arange(6.0).view(3, 2)},
        {"embeds": torch.arange(6.0).view(2, 3).to(torch.bfloat16)},
        {"embeds": torch.arange(6.0).view(2, 3) + torch.tensor([0, 0, 1e-6])},
        {"embeds": torch.arange(6.0).view(2, 3).view(torch.int32)},
        {"mask": torch.tensor([True, False])},
        {"shapes": [[[1, 2, 4]]]},
        {"more": 1},
    ],
)
def test_another_value_has_another_digest(change: dict[str, object]) -> None:
    assert branch_digest({**BRANCH, **change}) != branch_digest(BRANCH)
