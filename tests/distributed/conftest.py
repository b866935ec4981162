"""What one rank answers, computed once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.distributed.cases import CASES

from flowroll import Rollout
from flowroll.engine import Engine


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def one_rank(checkpoints: dict[str, Path], device: str) -> Callable[[str, str], list[list[Rollout]]]:
    """The rollouts of every case, by family and dtype."""
    found: dict[tuple[str, str], list[list[Rollout]]] = {}

    def get(family: str, dtype: str) -> list[list[Rollout]]:
        if (family, dtype) not in found:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            with Engine(checkpoints[family], dtype=dtype, device=device) as engine:
                found[family, dtype] = [engine.rollout(**request) for request in CASES.values()]
            torch.set_num_threads(threads)
        return found[family, dtype]

    return get
