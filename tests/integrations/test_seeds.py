import json
from pathlib import Path

import numpy
import pytest
import torch

from flowroll.errors import InvalidRequestError
from flowroll.integrations.seeds import fold_seed

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "verl_omni.json").read_text())


def test_seeds_of_32_bits_stay_as_they_are() -> None:
    assert [fold_seed(seed) for seed in (0, 1, 42, 2**32 - 1)] == [0, 1, 42, 2**32 - 1]
    assert [fold_seed(seed) for seed in (numpy.int64(7), torch.tensor(8))] == [7, 8]


def test_longer_seeds_become_the_exclusive_or_of_their_halves() -> None:
    assert fold_seed(2**32) == 1
    assert fold_seed((5 << 32) | 3) == 6
    assert fold_seed(2**63 - 1) == (2**31 - 1) ^ (2**32 - 1)


@pytest.mark.parametrize("row", RECORDED["seeds"])
def test_the_seeds_of_one_batch_stay_different(row: dict[str, list[int]]) -> None:
    folded = list(map(fold_seed, row["seeds"]))
    assert len(set(folded)) == len(set(row["seeds"])) and all(0 <= seed < 2**32 for seed in folded)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "7", None])
def test_other_values_are_refused(seed: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"seed must be an integer from 0 to 2\^63 - 1"):
        fold_seed(seed)
