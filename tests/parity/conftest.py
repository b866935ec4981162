"""Engines and pipelines on the tiny checkpoints, one of each per family and dtype."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.guiding import PicturedEngine, pictured_pipeline

from flowroll.engine import Engine
from flowroll.engine.runner.recorder import Rows
from flowroll.families.alignment import align_weights


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every parity test runs on the CPU and, where there is one, on the GPU."""
    return request.param


@pytest.fixture(autouse=True)
def used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are made in memory that held other numbers, so that whatever is never written shows."""
    make = Rows.__init__

    def make_and_spoil(self: Rows, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.tensor.fill_(math.nan)

    monkeypatch.setattr(Rows, "__init__", make_and_spoil)


@pytest.fixture(scope="session")
def engine_of(checkpoints: dict[str, Path], device: str) -> Iterator[Callable[[str, str], Engine]]:
    engines: dict[tuple[str, str], Engine] = {}

    def get(family: str, dtype: str) -> Engine:
        if (family, dtype) not in engines:
            engines[family, dtype] = PicturedEngine(checkpoints[family], dtype=dtype, device=device)
        return engines[family, dtype]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def pipeline_of(checkpoints: dict[str, Path], device: str) -> Callable[[str, str], Any]:
    pipelines: dict[tuple[str, str], Any] = {}

    def get(family: str, dtype: str) -> Any:
        if (family, dtype) not in pipelines:
            pipeline = DiffusionPipeline.from_pretrained(checkpoints[family], dtype=getattr(torch, dtype))
            pipeline.set_progress_bar_config(disable=True)
            pipelines[family, dtype] = pictured_pipeline(family, pipeline.to(device))
            # The bits of the pipeline itself depend on where a file's header puts its weights; see families/alignment.py.
            align_weights(pipeline.transformer)
        return pipelines[family, dtype]

    return get
