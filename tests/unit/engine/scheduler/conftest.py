"""One tiny engine for all of these tests; its threads never start."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.engine.scheduler.hand import Hand

from flowroll.engine import Engine


@pytest.fixture(scope="package")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture
def hand(engine: Engine) -> Hand:
    return Hand(engine)
