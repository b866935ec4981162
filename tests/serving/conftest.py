"""One service per family and one server over each, shared by the tests that leave them as they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tests.guiding import PicturedEngine
from tests.serving.servers import HookedEngine, serving

from flowroll.engine import Engine, Limits
from flowroll.engine.service import EngineService


@pytest.fixture(scope="session")
def service(qwen_checkpoint: Path) -> Iterator[EngineService]:
    limits = Limits(max_pixels=512 * 512, max_steps=1000, max_outputs=64)
    with Engine(qwen_checkpoint, device="cpu", limits=limits) as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="session")
def z_service(z_image_checkpoint: Path) -> Iterator[EngineService]:
    with Engine(z_image_checkpoint, device="cpu", variant="turbo") as engine, EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="session")
def service_of(
    service: EngineService, z_service: EngineService, checkpoints: dict[str, Path]
) -> Iterator[Callable[[str], EngineService]]:
    """The service of a family."""
    known = {"qwen_image": service, "z_image": z_service}
    with ExitStack() as stack:

        def get(family: str) -> EngineService:
            if family not in known:
                engine = stack.enter_context(PicturedEngine(checkpoints[family], device="cpu"))
                known[family] = stack.enter_context(EngineService(engine, max_queue=4))
            return known[family]

        yield get


@pytest.fixture(scope="session")
def server(service: EngineService) -> Iterator[httpx.Client]:
    with serving(service) as client:
        yield client


@pytest.fixture
def hooked(qwen_checkpoint: Path) -> Iterator[HookedEngine]:
    """An engine that does as the test says, for this test alone."""
    with HookedEngine(qwen_checkpoint, device="cpu") as engine:
        yield engine
