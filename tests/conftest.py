import os
import tempfile
import zlib

# Before the first import of a Hugging Face library: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Before torch: bfloat16 products by AMX have bits that depend on the number of rows and columns, and an engine of several ranks
# refuses them. Other CPUs have no AMX, so the tests compute the same everywhere.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# What the engines of a run find out about kernels is kept for that run alone; workers of one run have one folder.
if "FLOWROLL_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="flowroll-cache-")
    os.environ["FLOWROLL_CACHE_DIR"] = _CACHE.name

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


# Its pipelines resize every reference image to 1024^2 pixels, which takes its VAE half a second.
_ELSEWHERE = "qwen_image_edit"


def is_dealt_elsewhere(item: pytest.Item) -> bool:
    """Whether a test's family is left to `make proofs`: of a test that runs for every family, `make test` has one.

    Which one differs from test to test. Not of a family's own tests, and not of the proofs, which choose their rows themselves;
    the slow family's are all there.
    """
    from flowroll.families import FAMILIES

    names, file = [name for name in FAMILIES if name != _ELSEWHERE], item.path
    params = getattr(item, "callspec", None)
    if params is None or "proofs" in file.parts:
        return params is not None and _ELSEWHERE in item.nodeid
    values = [one for value in params.params.values() for one in (value if isinstance(value, tuple) else (value,))]
    found = {value for value in values if isinstance(value, str) and value in FAMILIES}
    if len(found) != 1 or any(file.stem == f"test_{name}" for name in FAMILIES):
        return False
    return found.pop() != names[zlib.crc32(item.nodeid.partition("[")[0].encode()) % len(names)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` or `multigpu` where there is no such hardware, and long tests that were not asked for."""
    needed = {"gpu": 1, "multigpu": 2}
    for item in items:
        if is_dealt_elsewhere(item):
            item.add_marker(pytest.mark.slow)
        long = item.get_closest_marker("proof") or item.get_closest_marker("slow")
        if long and not config.getoption("--proofs"):
            item.add_marker(pytest.mark.skip(reason=f"{long.name}; make proofs runs it"))
        for mark, count in needed.items():
            if item.get_closest_marker(mark) and torch.cuda.device_count() < count:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA device(s)"))
