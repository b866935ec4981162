"""update == an engine started on the new weights: however they came, on one rank and on several, with requests in flight."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.guiding import in_words_of
from tests.pairs import deal, pairs, rest_slow
from tests.proofs.cases import DTYPES, EVERYTHING, FAMILIES
from tests.proofs.doors import assert_same_samples, num_steps, served, skip_where_refused, together
from tests.weights import WEIGHTS, with_other
from torch import nn

from flowroll import Rollout
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.types import Layout

BASE = {"prompt": "a cat", "height": 192, "width": 192, "num_inference_steps": 8, "guidance_scale": 4.0, **EVERYTHING}
REQUESTS = [{**BASE, "seed": 1}, {**BASE, "seed": 2, "num_outputs_per_prompt": 2}, {**BASE, "seed": 9, "guidance_scale": 0.0}]

COLUMNS = {
    "layout": ("single", "sp2", "tp2", "cfg2"),
    "family": FAMILIES,
    "dtype": DTYPES,
    "door": ("server", "engine", "engine"),
    "way": ("tensors", "disk"),
}
# Every value comes in one of the first rows, but for the later families; all pairs come in the others.
FIRST = deal(*(COLUMNS | {"family": FAMILIES[: len(COLUMNS["layout"])], "dtype": ("float32", *DTYPES)}).values())
ROWS = [dict(zip(COLUMNS, row, strict=True)) for row in FIRST] + pairs(**COLUMNS)


@contextmanager
def opened(
    row: dict[str, str], device: str, checkpoint: Path, folder: Path
) -> Iterator[tuple[Engine | Client, Callable[[], int]]]:
    """The door of a row, and the number of steps or forwards that it has run so far."""
    layout = Layout.parse(row["layout"])
    if row["door"] == "engine":
        calls: list[str] = []
        # Of every module; a step calls hundreds of them.
        handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        try:
            with Engine(checkpoint, dtype=row["dtype"], device=device, layout=layout, rank_timeout_s=60.0) as engine:
                yield engine, lambda: sum(name.endswith("Transformer2DModel") for name in calls)
        finally:
            handle.remove()
        return
    degrees = [f"--{axis}={getattr(layout, axis)}" for axis in ("sp", "tp")] + ["--cfg-parallel"] * layout.cfg_parallel
    flags = ("--device", device, "--dtype", row["dtype"], "--weights-root", str(folder), *degrees)
    with served(checkpoint, folder / "log.txt", *flags) as address, Client(address) as client:
        yield client, lambda: num_steps(address)


def update(door: Engine | Client, other: Path, way: str) -> None:
    if way == "disk":
        door.update_weights_from_disk(other)
    elif isinstance(door, Client):
        door.update_weights(load_file(other / "transformer" / WEIGHTS), bucket_bytes=2**16)
    else:
        door.update_weights_from_tensors(load_file(other / "transformer" / WEIGHTS).items())


def of_the_weights(answers: list[list[Rollout]]) -> list[list[Rollout]]:
    """The answers without the version, which counts the updates of an engine and says nothing about the weights."""
    return [[dataclasses.replace(rollout, weight_version="") for rollout in answer] for answer in answers]


@pytest.mark.parametrize("row", rest_slow(ROWS, later=2))
def test_an_updated_engine_has_the_bits_of_one_that_was_started_on_the_weights(
    row: dict[str, str], device: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    if device == "cuda" and torch.cuda.device_count() < Layout.parse(row["layout"]).num_ranks:
        pytest.skip("needs more CUDA devices")
    folder = checkpoints[row["family"]]
    skip_where_refused(folder, dtype=row["dtype"], device=device, layout=Layout.parse(row["layout"]))
    requests = [in_words_of(row["family"], request) for request in REQUESTS]
    other = with_other(folder, tmp_path / "other")
    answers_of = {}
    for version, path in (("0", folder), ("1", other)):
        with Engine(path, dtype=row["dtype"], device=device) as engine:
            answers_of[version] = of_the_weights([engine.rollout(**request) for request in requests])
    with opened(row, device, folder, tmp_path) as (door, steps_taken), ThreadPoolExecutor(1) as pool:
        before = together(door, requests)
        taken = steps_taken()
        pending = pool.submit(together, door, requests)
        while steps_taken() == taken and not pending.done():
            time.sleep(0.01)
        update(door, other, row["way"])
        during = pending.result()
        after = together(door, requests)
    for answers, versions in ((before, {"0"}), (during, {"0", "1"}), (after, {"1"})):
        # No sample mixes the old weights and the new ones: each is wholly of the version that it says it has.
        for number, (answer, plain) in enumerate(zip(answers, of_the_weights(answers), strict=True)):
            for index, rollout in enumerate(answer):
                assert rollout.weight_version in versions
                assert_same_samples([plain[index]], [answers_of[rollout.weight_version][number][index]])
