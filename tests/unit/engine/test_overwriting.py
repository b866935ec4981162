"""New weights that are copied over the old ones, as on a GPU. Here a CPU's are: what differs is the rule that chooses."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, WEIGHTS, with_other
from torch import Tensor

from flowroll.engine import Engine
from flowroll.engine.runner.shapes import TensorShape
from flowroll.engine.weights import host, receiver, shares, staged
from flowroll.engine.weights.host import PinnedMemory
from flowroll.engine.weights.shares import Shares
from flowroll.engine.weights.staged import Slot, StagedWeights, find_weights
from flowroll.errors import FlowrollError, RankLostError


@pytest.fixture(autouse=True)
def overwriting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (staged, receiver, shares):
        monkeypatch.setattr(module, "is_overwritten", lambda live: True)


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with another transformer; read only."""
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


def from_disk(engine: Engine, other: Path) -> StagedWeights:
    return engine.stage_weights(find_weights(other, "transformer"))


def by_tensors(engine: Engine, other: Path) -> StagedWeights:
    arriving = engine.receive_weights()
    arriving.put(list(load_file(other / "transformer" / WEIGHTS).items()))
    return arriving.stage()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [from_disk, by_tensors])
def test_they_wait_apart_and_are_then_those_of_an_engine_started_on_them_at_the_same_addresses(
    stage: Callable[[Engine, Path], StagedWeights], dtype: str, z_image_checkpoint: Path, other: Path
) -> None:
    with Engine(other, device="cpu", dtype=dtype) as fresh:
        (expected,), checksum = fresh.rollout(**REQUEST), fresh.weights_checksum()
    with Engine(z_image_checkpoint, device="cpu", dtype=dtype) as engine:
        (old,) = engine.rollout(**REQUEST)
        places = {name: one.data_ptr() for name, one in engine._model.transformer.state_dict().items()}
        waiting = stage(engine, other)
        assert_same_bits(engine.rollout(**REQUEST)[0], old)
        assert waiting.num_bytes == sum(one.nbytes for one in engine._model.transformer.state_dict().values())
        engine.commit_weights(waiting, weight_version="0")
        assert_same_bits(engine.rollout(**REQUEST)[0], expected)
        assert engine.weights_checksum() == checksum
        assert {name: one.data_ptr() for name, one in engine._model.transformer.state_dict().items()} == places


def test_an_engine_whose_weights_were_half_overwritten_ends(
    z_image_checkpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise MemoryError("no memory left")

    told: list[FlowrollError] = []
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.on_failure(told.append)
        monkeypatch.setattr(engine._weights._adapters, "over_new_base", fail)
        with pytest.raises(
            RankLostError, match=r"put in place whole, got MemoryError after some were: no memory left; restart"
        ):
            engine.update_weights_from_disk(other)
        for _ in range(2):
            with pytest.raises(RankLostError, match="put in place whole"):
                engine.rollout(**REQUEST)
        assert engine.weight_version == "0"
        engine.on_failure(told.append)
    assert len(told) == 2 and "no memory left" in told[0].message


def test_a_copy_that_fails_half_way_is_no_update() -> None:
    waiting = StagedWeights("transformer", {}, [(torch.zeros(2), torch.ones(2)), (torch.zeros(2), torch.ones(3))], 0.0)
    with pytest.raises(RankLostError, match="RuntimeError after some were"):
        waiting.commit(lambda: pytest.fail("the update must not be concluded"))


def test_a_rank_keeps_its_own_rows_of_what_is_broadcast_apart_from_the_old_ones() -> None:
    sent = {"rows": torch.arange(12.0).reshape(4, 3), "whole": torch.arange(3.0)}
    slots = {
        "rows": Slot(live=torch.zeros(2, 3), dtype=torch.float32, shape=(4, 3), first_row=2),
        "whole": Slot(live=torch.zeros(3), dtype=torch.float32, shape=(3,)),
    }
    coming = iter(sent.values())

    def broadcast(target: Tensor) -> None:
        target.copy_(shares.as_bytes(next(coming)))

    mesh: Any = SimpleNamespace(broadcast=broadcast)
    waiting = Shares({name: TensorShape.of(one) for name, one in sent.items()}, slots).fill(mesh)
    assert not slots["rows"].live.any() and not slots["whole"].live.any()
    waiting.commit(lambda: None)
    assert torch.equal(slots["rows"].live, sent["rows"][2:]) and torch.equal(slots["whole"].live, sent["whole"])


def test_pinned_tensors_are_cut_from_chunks_that_no_allocator_rounds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty

    def pinned(num_bytes: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        made.append(num_bytes)
        return empty(num_bytes, dtype=dtype)

    memory = PinnedMemory()
    monkeypatch.setattr(host, "can_pin", lambda: True)
    monkeypatch.setattr(host, "_CHUNK_BYTES", 1024)
    monkeypatch.setattr(torch, "empty", pinned)
    asked = [
        ((3, 5), torch.float32, None),
        ((2, 7), torch.bfloat16, (1, 2)),
        ((), torch.float32, None),
        ((0, 4), torch.float32, None),
    ]
    asked += [((100,), torch.float32, None), ((200,), torch.float64, None), ((100,), torch.float32, None)]
    found = [memory.empty(*one) for one in asked]
    for number, tensor in enumerate(found):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype, stride)) in enumerate(zip(found, asked, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 64) == (shape, dtype, 0)
        assert tensor.stride() == stride if stride is not None else tensor.is_contiguous()
        assert (tensor == number).all()
    assert made == [1024, 1600, 1024]
