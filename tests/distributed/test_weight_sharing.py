"""Tensors that rank 0 shares out: every rank takes its part, or none does."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.test_rank_group import no_torchrun  # noqa: F401  # an autouse fixture
from tests.distributed.test_weight_updates import EVERY_LAYOUT, LAYOUTS, REQUEST
from tests.rollouts import assert_same_bits
from tests.weights import WEIGHTS, with_other
from torch import Tensor

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.engine.weights.groups import GlooMembership, receive_from_group
from flowroll.engine.weights.staged import tensor_head
from flowroll.errors import RankLostError, WeightsRejectedError
from flowroll.parallel import processes
from flowroll.parallel.broadcasting import BroadcastGroup
from flowroll.parallel.rendezvous import serve_store
from flowroll.types import Layout

Truth = list[tuple[dict[str, Tensor], Rollout, str]]


@pytest.fixture(scope="module")
def truth(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Weights, rollout and checksum of one rank, for the old and for the new weights."""
    found = []
    for folder in (z_image_checkpoint, with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")):
        with Engine(folder, device="cpu") as engine:
            (rollout,) = engine.rollout(**REQUEST)
            found.append((load_file(folder / "transformer" / WEIGHTS), rollout, engine.weights_checksum()))
    return found


# An engine of several ranks is alone in its process: these come before the one that the others share.
FAILING = "import flowroll.engine.runner.changes as shares\n{fault}\nfrom flowroll.engine.runner.__main__ import main; main()"


def test_a_rank_without_memory_leaves_the_old_weights_on_all(
    z_image_checkpoint: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = (
        "calls, Shares = iter(range(9)), shares.Shares\n"
        "def fail_once(*a):\n"
        "    if next(calls) == 0: raise MemoryError('no memory left')\n"
        "    return Shares(*a)\n"
        "shares.Shares = fail_once"
    )
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", FAILING.format(fault=fault)))
    (_, old, old_sum), (tensors, new, new_sum) = truth
    with Engine(z_image_checkpoint, device="cpu", layout=Layout(tp=2), rank_timeout_s=30.0) as engine:
        with pytest.raises(WeightsRejectedError, match=r"rank 1: .*no memory left"):
            engine.update_weights_from_tensors(tensors)
        assert (engine.weight_version, engine.weights_checksum()) == ("0", old_sum)
        assert_same_bits(engine.rollout(**REQUEST)[0], old)
        assert engine.update_weights_from_tensors(tensors).weight_version == "1"
        assert_same_bits(engine.rollout(**REQUEST)[0], new)
        assert engine.weights_checksum() == new_sum


@pytest.mark.slow
def test_a_rank_that_dies_while_it_receives_takes_the_engine_down(
    z_image_checkpoint: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = "import os; shares.Shares.fill = lambda *_: os._exit(7)"
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", FAILING.format(fault=fault)))
    with Engine(z_image_checkpoint, device="cpu", layout=Layout(sp=2), rank_timeout_s=30.0) as engine:
        with pytest.raises(RankLostError, match="rank 1 must live as long as its engine, got its end with status 7"):
            engine.update_weights_from_tensors(truth[1][0])
        assert engine.weight_version == "0"
        with pytest.raises(RankLostError):
            engine.rollout(**REQUEST)


@pytest.fixture(scope="module", params=EVERY_LAYOUT)
def several(request: pytest.FixtureRequest, z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu", layout=LAYOUTS[request.param], rank_timeout_s=30.0) as engine:
        yield engine


def test_shared_tensors_give_every_rank_the_bits_of_one_that_was_started_on_them(several: Engine, truth: Truth) -> None:
    (before, old, old_sum), (tensors, new, new_sum) = truth
    several.update_weights_from_tensors(tensors, weight_version="5")
    (got,) = several.rollout(**REQUEST)
    assert_same_bits(got, new)
    assert not torch.equal(got.dit_trajectory.latents, old.dit_trajectory.latents)
    assert got.weight_version == "5" and several.weights_checksum() == new_sum
    items, keys = list(before.items()), []
    for part in (items[::2], items[1::2]):
        several.update_weights_from_tensors(part, partial=True)
        keys.append(several._peers._store.num_keys())
    # The last command alone: who received it is not known yet.
    assert keys[1] <= keys[0] + 1
    assert several.weights_checksum() == old_sum
    assert_same_bits(several.rollout(**REQUEST)[0], old)


def test_broadcast_tensors_reach_every_rank_through_rank_0(several: Engine, truth: Truth) -> None:
    several.update_weights_from_tensors(truth[0][0])
    tensors, new, new_sum = truth[1]
    store, port = serve_store()
    place: dict[str, Any] = {"world_size": 2, "address": "127.0.0.1", "port": port, "timeout_s": 60.0}

    def send() -> None:
        with BroadcastGroup("trainer", rank=0, backend="gloo", store=store, **place) as group:
            for tensor in tensors.values():
                group.broadcast(tensor)
            assert done.wait(60)

    done = threading.Event()
    trainer = threading.Thread(target=send)
    trainer.start()
    incoming = several.receive_weights()
    group = GlooMembership("trainer", rank=1, **place)
    group.join()
    heads = [tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    receive_from_group(incoming, group, heads)
    done.set()
    trainer.join()
    group.close()
    several.commit_weights(incoming.stage())
    assert_same_bits(several.rollout(**REQUEST)[0], new)
    assert several.weights_checksum() == new_sum
    several.update_weights_from_tensors(truth[0][0])


def test_an_exchange_that_fails_on_rank_0_is_made_by_no_rank(
    several: Engine, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = several.weight_version

    def refuse(*_: object) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(several._executor, "commit", refuse)
        with pytest.raises(MemoryError):
            several.update_weights_from_tensors(truth[1][0])
    assert several.weight_version == version and several.weights_checksum() == truth[0][2]
    assert_same_bits(several.rollout(**REQUEST)[0], truth[0][1])
    several.update_weights_from_tensors(truth[1][0])
    assert_same_bits(several.rollout(**REQUEST)[0], truth[1][1])
