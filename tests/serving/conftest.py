"""One worker per family and one server over each, shared by the tests that leave them as they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tests.serving.servers import HookedEngine, serving

from flowroll.engine import Engine, Limits
from flowroll.engine.worker import EngineWorker


@pytest.fixture(scope="session")
def worker(qwen_checkpoint: Path) -> Iterator[EngineWorker]:
    limits = Limits(max_pixels=512 * 512, max_steps=1000, max_outputs=64)
    with Engine(qwen_checkpoint, device="cpu", limits=limits) as engine, EngineWorker(engine, max_queue=4) as worker:
        yield worker


@pytest.fixture(scope="session")
def z_worker(z_image_checkpoint: Path) -> Iterator[EngineWorker]:
    with Engine(z_image_checkpoint, device="cpu", variant="turbo") as engine, EngineWorker(engine, max_queue=4) as worker:
        yield worker


@pytest.fixture(scope="session")
def worker_of(
    worker: EngineWorker, z_worker: EngineWorker, checkpoints: dict[str, Path]
) -> Iterator[Callable[[str], EngineWorker]]:
    """The worker of a family."""
    known = {"qwen_image": worker, "z_image": z_worker}
    with ExitStack() as stack:

        def get(family: str) -> EngineWorker:
            if family not in known:
                engine = stack.enter_context(Engine(checkpoints[family], device="cpu"))
                known[family] = stack.enter_context(EngineWorker(engine, max_queue=4))
            return known[family]

        yield get


@pytest.fixture(scope="session")
def server(worker: EngineWorker) -> Iterator[httpx.Client]:
    with serving(worker) as client:
        yield client


@pytest.fixture
def hooked(qwen_checkpoint: Path) -> Iterator[HookedEngine]:
    """An engine that does as the test says, for this test alone."""
    with HookedEngine(qwen_checkpoint, device="cpu") as engine:
        yield engine
