"""Weights in memory: which part a rank reads, and where they lie."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tests.guiding import PicturedEngine
from tests.unit.parallel.test_linears import KnowingMesh

from flowroll.engine import Limits
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_transformer
from flowroll.engine.outline import check_layout, outline_model
from flowroll.errors import CheckpointError, InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.parallel.linears import ColumnParallelLinear, count_parameters
from flowroll.types import Layout

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class TensorMesh(KnowingMesh):
    """A mesh with a tensor-parallel axis alone."""

    def degree(self, axis: str) -> int:
        return self._degree if axis == "tp" else 1


@pytest.fixture(params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ranks_of_a_tensor_parallel_axis_hold_the_weights_between_them(folder: Path, dtype: torch.dtype) -> None:
    checkpoint = examine_checkpoint(folder, variant=None)
    whole: Any = load_transformer(checkpoint, dtype, None)
    parts = [load_transformer(checkpoint, dtype, TensorMesh(rank, 2)) for rank in range(2)]
    assert [count_parameters(part) for part in parts] == [count_parameters(whole)] * 2
    sharded = {name for name, module in parts[0].named_modules() if isinstance(module, ColumnParallelLinear)}
    assert sharded
    for name, weight in whole.named_parameters():
        owner = name.rpartition(".")[0]
        pieces = [part.get_parameter(name) for part in parts]
        assert all(piece.dtype == dtype and piece.requires_grad for piece in pieces)
        assert torch.equal(torch.cat(pieces) if owner in sharded else pieces[0], weight)


def test_only_a_ranks_own_columns_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = examine_checkpoint(folder, variant=None)

    def load_all(*_: object, **__: object) -> None:
        raise AssertionError("the whole transformer was loaded")

    monkeypatch.setattr(getattr(diffusers, checkpoint.class_of("transformer")), "from_pretrained", load_all)
    part = load_transformer(checkpoint, torch.float32, TensorMesh(1, 2))
    bytes_held = sum(parameter.untyped_storage().nbytes() for parameter in part.parameters())
    assert bytes_held == sum(parameter.nbytes for parameter in part.parameters()) < 4 * count_parameters(part)


def test_a_checkpoint_in_several_files_is_shared_out_too(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    whole = load_transformer(examine_checkpoint(folder, variant=None), torch.float32, None)
    shutil.rmtree(copy / "transformer")
    whole.save_pretrained(copy / "transformer", max_shard_size="200KB")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 2
    checkpoint = examine_checkpoint(copy, variant=None)
    part = load_transformer(checkpoint, torch.float32, TensorMesh(1, 2))
    for name, module in part.named_modules():
        if isinstance(module, ColumnParallelLinear):
            assert torch.equal(module.weight, whole.get_parameter(f"{name}.weight")[module.own_columns])


def test_a_weight_that_is_missing_is_named_before_any_is_read(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    tensors = load_file(copy / WEIGHTS)
    name = next(name for name in sorted(tensors) if name.endswith("to_q.weight"))
    del tensors[name]
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"got none for {name}"):
        load_transformer(examine_checkpoint(copy, variant=None), torch.float32, TensorMesh(0, 2))


def test_a_degree_is_checked_without_weights(folder: Path) -> None:
    checkpoint = examine_checkpoint(folder, variant=None)
    outline = outline_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    check_layout(outline, Layout(tp=2, sp=4), Limits())
    with pytest.raises(InvalidRequestError, match="tp must divide"):
        check_layout(outline, Layout(tp=7), Limits())
    with pytest.raises(InvalidRequestError, match="sp must leave"):
        check_layout(outline, Layout(sp=4), Limits(max_pixels=128 * 128))


def test_weights_lie_aligned_wherever_the_file_begins_and_the_bits_stay(folder: Path, tmp_path: Path) -> None:
    # With the weights where the file maps them, a product of one row depends on the length of the file's header.
    shifted = tmp_path / folder.name
    shutil.copytree(folder, shifted)
    data = (shifted / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    (shifted / WEIGHTS).write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
    mapped = DiffusionPipeline.from_pretrained(shifted).transformer
    assert any(parameter.data_ptr() % 16 for parameter in mapped.parameters())
    request: dict[str, Any] = {"prompt": "a cat", "seed": 1, "height": 64, "width": 64, "num_inference_steps": 2}
    images = []
    for path in (folder, shifted):
        with PicturedEngine(path, device="cpu", dtype="float32") as engine:
            assert not any(parameter.data_ptr() % 64 for parameter in engine._model.transformer.parameters())
            images.append(engine.rollout(**request)[0].image)
    assert torch.equal(*images)
