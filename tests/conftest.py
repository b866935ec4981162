import os

# Before the first import of a Hugging Face library: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch

# A fixed number, so that results do not depend on the machine; more threads only slow such small models down.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image checkpoint folder; read only."""
    return _make("qwen_image", tmp_path_factory)


@pytest.fixture(scope="session")
def z_image_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Z-Image checkpoint folder; read only."""
    return _make("z_image", tmp_path_factory)


@pytest.fixture(scope="session")
def checkpoints(qwen_checkpoint: Path, z_image_checkpoint: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """A tiny checkpoint folder of every registered family; read only."""
    from flowroll.families import FAMILIES

    known = {"qwen_image": qwen_checkpoint, "z_image": z_image_checkpoint}
    return {family: known.get(family) or _make(family, tmp_path_factory) for family in FAMILIES}


def _make(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.processors import load_without_torchvision

    from flowroll.testing import make_checkpoint

    load_without_torchvision()

    return make_checkpoint(family, tmp_path_factory.mktemp("checkpoints") / family)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long tests are too long for every run."""
    parser.addoption("--proofs", action="store_true", help="run the tests marked `slow` or `proof` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` or `multigpu` where there is no such hardware, and long tests that were not asked for."""
    needed = {"gpu": 1, "multigpu": 2}
    for item in items:
        long = item.get_closest_marker("proof") or item.get_closest_marker("slow")
        if long and not config.getoption("--proofs"):
            item.add_marker(pytest.mark.skip(reason=f"{long.name}; make proofs runs it"))
        for mark, count in needed.items():
            if item.get_closest_marker(mark) and torch.cuda.device_count() < count:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA device(s)"))
