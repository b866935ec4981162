"""Engines, a trainer's pipelines, and what every sample is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.processors import load_without_torchvision
from tests.proofs.cases import DTYPES, FAMILIES, Request
from tests.proofs.doors import one_by_one, served, skip_where_refused

from flowroll import Rollout, replay
from flowroll.engine import BatchLimits, Engine
from flowroll.testing import make_checkpoint
from flowroll.types import Layout

EngineOf = Callable[[str, str], Engine]
AloneOf = Callable[[str, str, Request], Sequence[Rollout]]
PipelineOf = Callable[[str, str], Any]
ServerOf = Callable[[str, str], str]
RanksOf = Callable[[str, str, str], Engine]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every proof runs on the CPU and, where there is one, on the GPU."""
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every registered family; read only."""
    load_without_torchvision()
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, folder / family) for family in FAMILIES}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the suite itself run under torchrun, its engines start their own ranks all the same."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def engine_of(checkpoints: dict[str, Path], device: str) -> Iterator[EngineOf]:
    """An engine of one rank that batches, by family and dtype."""
    engines: dict[tuple[str, str], Engine] = {}

    def get(family: str, dtype: str) -> Engine:
        if (family, dtype) not in engines:
            engines[family, dtype] = Engine(checkpoints[family], dtype=dtype, device=device)
        return engines[family, dtype]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def alone_of(checkpoints: dict[str, Path], device: str) -> Iterator[AloneOf]:
    """What the samples of a request are, each run by itself on an engine of one rank that never shares a forward."""
    engines: dict[tuple[str, str], Engine] = {}
    known: dict[tuple[str, str, str], list[Rollout]] = {}

    def get(family: str, dtype: str, request: Request) -> Sequence[Rollout]:
        if (family, dtype) not in engines:
            limits = BatchLimits(max_batch_samples=1, max_running_samples=1)
            engines[family, dtype] = Engine(checkpoints[family], dtype=dtype, device=device, batching=limits)
        key = (family, dtype, repr(sorted(request.items())))
        if key not in known:
            known[key] = one_by_one(engines[family, dtype], request)
        return known[key]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def pipeline_of(checkpoints: dict[str, Path], device: str) -> PipelineOf:
    """The diffusers pipeline of a checkpoint, as a trainer has it, by family and dtype."""
    pipelines: dict[tuple[str, str], Any] = {}

    def get(family: str, dtype: str) -> Any:
        if (family, dtype) not in pipelines:
            pipeline = DiffusionPipeline.from_pretrained(checkpoints[family], dtype=getattr(torch, dtype))
            pipeline.set_progress_bar_config(disable=True)
            pipelines[family, dtype] = pipeline.to(device)
            # The bits of the pipeline itself depend on where a file's header puts its weights.
            replay.align_weights(pipeline.transformer)
        return pipelines[family, dtype]

    return get


@pytest.fixture(scope="module")
def ranks_of(checkpoints: dict[str, Path], device: str) -> Iterator[RanksOf]:
    """An engine of several ranks, by family, dtype and layout. A process holds one at a time: asking for another closes it."""
    opened: dict[tuple[str, str, str], Engine] = {}

    def get(family: str, dtype: str, layout: str) -> Engine:
        key = (family, dtype, layout)
        degrees = Layout.parse(layout)
        if device == "cuda" and torch.cuda.device_count() < degrees.num_ranks:
            pytest.skip(f"needs {degrees.num_ranks} CUDA devices")
        if key not in opened:
            skip_where_refused(checkpoints[family], dtype=dtype, device=device, layout=degrees)
            close()
            opened[key] = Engine(checkpoints[family], dtype=dtype, device=device, layout=degrees, rank_timeout_s=60.0)
        return opened[key]

    def close() -> None:
        for engine in opened.values():
            engine.close()
        opened.clear()

    yield get
    close()


@pytest.fixture(scope="session")
def server_of(checkpoints: dict[str, Path], device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerOf]:
    """The address of a server, by family and dtype; one half of them answers in SGLang's words."""
    addresses: dict[tuple[str, str], str] = {}

    with ExitStack() as stack:

        def get(family: str, dtype: str) -> str:
            if (family, dtype) not in addresses:
                dialect = ("native", "sglang")[(FAMILIES.index(family) + DTYPES.index(dtype)) % 2]
                log = tmp_path_factory.mktemp("server") / "log.txt"
                flags = ("--device", device, "--dtype", dtype, "--wire-dialect", dialect)
                addresses[family, dtype] = stack.enter_context(served(checkpoints[family], log, *flags))
            return addresses[family, dtype]

        yield get
