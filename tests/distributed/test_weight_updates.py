"""New weights for an engine of several ranks: every rank takes its part, or none does."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.test_rank_group import no_torchrun  # noqa: F401  # an autouse fixture
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST as SMALL
from tests.weights import WEIGHTS, in_shards, with_other

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.weights.staged import find_weights
from flowroll.errors import RankLostError, WeightsMismatchError, WeightsRejectedError
from flowroll.parallel import processes
from flowroll.types import Layout

# 144 image tokens: two ranks share them.
REQUEST: dict[str, Any] = {**SMALL, "height": 192, "width": 192}
LAYOUTS = {"sp2": Layout(sp=2), "tp2": Layout(tp=2)}
# With tensor parallelism each rank has a part of the weights of its own.
EVERY_LAYOUT = ["tp2", pytest.param("sp2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with another transformer, in two files."""
    other = with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")
    in_shards(other / "transformer", 2)
    return other


@pytest.fixture(scope="module")
def expected(z_image_checkpoint: Path, other: Path) -> list[tuple[Rollout, str]]:
    """Rollout and checksum of one rank, with the old and the new weights."""
    found = []
    for folder in (z_image_checkpoint, other):
        with Engine(folder, device="cpu") as engine:
            found.append((engine.rollout(**REQUEST)[0], engine.weights_checksum()))
    return found


# An engine of several ranks is alone in its process: these come before the one that the others share.
FAILING = (
    "import flowroll.engine.runner.changes as changes\n"
    "from flowroll.engine.weights.staged import StagedWeights, rejected\n"
    "{fault}\n"
    "from flowroll.engine.runner.__main__ import main; main()"
)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_a_rank_that_cannot_read_its_part_leaves_the_old_weights_on_all(
    layout: str, z_image_checkpoint: Path, other: Path, expected: list[tuple[Rollout, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = (
        "calls, stage = iter(range(9)), changes.stage_weights\n"
        "def fail_once(*a):\n"
        "    if next(calls) == 0: raise rejected(OSError(5, 'Input/output error'))\n"
        "    return stage(*a)\n"
        "changes.stage_weights = fail_once"
    )
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", FAILING.format(fault=fault)))
    (old, old_sum), (new, new_sum) = expected
    with Engine(z_image_checkpoint, device="cpu", layout=LAYOUTS[layout], rank_timeout_s=30.0) as engine:
        with pytest.raises(WeightsRejectedError, match=r"rank 1: .*Input/output error"):
            engine.update_weights_from_disk(other)
        assert (engine.weight_version, engine.weights_checksum()) == ("0", old_sum)
        assert_same_bits(engine.rollout(**REQUEST)[0], old)
        # The next one, which every rank can read, is taken by all.
        assert engine.update_weights_from_disk(other).weight_version == "1"
        assert_same_bits(engine.rollout(**REQUEST)[0], new)
        assert engine.weights_checksum() == new_sum


@pytest.mark.slow
def test_a_rank_that_dies_while_it_reads_takes_the_engine_down(
    z_image_checkpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = "import os; changes.stage_weights = lambda *_: os._exit(7)"
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", FAILING.format(fault=fault)))
    with Engine(z_image_checkpoint, device="cpu", layout=Layout(sp=2), rank_timeout_s=30.0) as engine:
        with pytest.raises(RankLostError, match="rank 1 must live as long as its engine, got its end with status 7"):
            engine.update_weights_from_disk(other)
        assert engine.weight_version == "0"
        with pytest.raises(RankLostError):
            engine.rollout(**REQUEST)


@pytest.fixture(scope="module", params=EVERY_LAYOUT)
def several(request: pytest.FixtureRequest, z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu", layout=LAYOUTS[request.param], rank_timeout_s=30.0) as engine:
        yield engine


def test_after_an_update_several_ranks_have_the_bits_of_one_that_was_started_on_the_new_weights(
    several: Engine, other: Path, z_image_checkpoint: Path, expected: list[tuple[Rollout, str]]
) -> None:
    (old, old_sum), (new, new_sum) = expected
    assert several.weights_checksum() == old_sum
    assert_same_bits(several.rollout(**REQUEST)[0], old)
    several.update_weights_from_disk(other, weight_version="5")
    (got,) = several.rollout(**REQUEST)
    assert_same_bits(got, new)
    assert not torch.equal(got.dit_trajectory.latents, old.dit_trajectory.latents)
    assert got.weight_version == "5" and several.weights_checksum() == new_sum
    keys = several._peers._store.num_keys()
    for _ in range(3):
        several.update_weights_from_disk(z_image_checkpoint)
    # The last command alone: who received it is not known yet.
    assert several._peers._store.num_keys() <= keys + 1
    assert_same_bits(several.rollout(**REQUEST)[0], old)


@pytest.mark.parametrize("same_time", [False, True])
def test_a_save_that_takes_the_place_of_the_one_that_rank_0_has_read_is_taken_by_no_rank(
    same_time: bool,
    several: Engine,
    z_image_checkpoint: Path,
    other: Path,
    expected: list[tuple[Rollout, str]],
    tmp_path: Path,
) -> None:
    several.update_weights_from_disk(z_image_checkpoint)
    version = several.weight_version
    folders = (z_image_checkpoint, with_other(z_image_checkpoint, tmp_path / "other"))
    weights = [folder / "transformer" / WEIGHTS for folder in folders]
    place, following = tmp_path / WEIGHTS, tmp_path / "next"
    shutil.copy(weights[1], place)
    staged = several.stage_weights(find_weights(place, "transformer"))
    shutil.copy(weights[0], following)
    if same_time:
        # A tool that keeps times, or a disk that rounds them.
        status = place.stat()
        os.utime(following, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(following, place)
    with pytest.raises(WeightsRejectedError, match="rank 1: the files must be the same on every rank, got another save"):
        several.commit_weights(staged)
    assert (several.weight_version, several.weights_checksum()) == (version, expected[0][1])
    assert_same_bits(several.rollout(**REQUEST)[0], expected[0][0])
    shutil.copy(weights[1], place)
    several.update_weights_from_disk(place)
    assert several.weights_checksum() == expected[1][1]


def test_several_ranks_verify_whole_tensors(several: Engine, z_image_checkpoint: Path) -> None:
    several.update_weights_from_disk(z_image_checkpoint)
    with Engine(z_image_checkpoint, device="cpu") as engine:
        sums = replay.tensor_checksums(engine._model.transformer)
    assert several.verify_weights(sums.items()) == len(sums)
    with pytest.raises(WeightsMismatchError, match="different: x_pad_token"):
        several.verify_weights({**sums, "x_pad_token": "0"}.items())
    several.update_weights_from_disk(z_image_checkpoint, module="vae")
    assert several.rollout(**REQUEST)


def test_an_exchange_that_fails_on_rank_0_is_made_by_no_rank(
    several: Engine, z_image_checkpoint: Path, other: Path, expected: list[tuple[Rollout, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    several.update_weights_from_disk(z_image_checkpoint)
    version = several.weight_version

    def refuse(*_: object) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(several._executor, "commit", refuse)
        with pytest.raises(MemoryError):
            several.update_weights_from_disk(other)
    assert several.weight_version == version
    assert_same_bits(several.rollout(**REQUEST)[0], expected[0][0])
