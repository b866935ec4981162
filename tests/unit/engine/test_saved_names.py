"""Checkpoints whose classes or files are not called by the plain names: saved under FSDP2, as a variant, in a cache."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from diffusers import DiffusionPipeline
from tests.guiding import PicturedEngine
from tests.hub import as_hub_cache
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, WEIGHTS, edit_config, in_shards, with_other
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.families import FAMILIES

COMPONENTS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved_under_fsdp(
    one_rank: None, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Makes a copy of a checkpoint with the configurations that its sharded components write themselves."""

    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp("fsdp") / family
        shutil.copytree(checkpoints[family], folder)
        pipeline = DiffusionPipeline.from_pretrained(checkpoints[family])
        for name in COMPONENTS:
            module = fully_shard(getattr(pipeline, name), mesh=init_device_mesh("cpu", (1,)))
            module.save_config(folder / name) if name != "text_encoder" else module.config.save_pretrained(folder / name)
        pipeline.register_modules(**{name: getattr(pipeline, name) for name in COMPONENTS})
        pipeline.save_config(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert all(index[name][1].startswith("FSDP") for name in COMPONENTS)
        for name in ("transformer", "vae"):
            assert json.loads((folder / name / "config.json").read_text())["_class_name"] == index[name][1]
        return folder

    return save


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, tuple[Rollout, dict[str, str]]]:
    """A rollout and the checksums of each plain checkpoint."""
    return {family: answers_of(folder) for family, folder in checkpoints.items()}


def answers_of(folder: Path) -> tuple[Rollout, dict[str, str]]:
    with PicturedEngine(folder, device="cpu", dtype="float32") as engine:
        return engine.rollout(**REQUEST)[0], {name: engine.weights_checksum(name) for name in COMPONENTS}


def assert_same_answers(found: tuple[Rollout, dict[str, str]], expected: tuple[Rollout, dict[str, str]]) -> None:
    assert_same_bits(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saved_under_fsdp_starts_and_is_taken_as_an_update(
    family: str,
    saved_under_fsdp: Callable[[str], Path],
    checkpoints: dict[str, Path],
    expected: dict[str, tuple[Rollout, dict[str, str]]],
    tmp_path: Path,
) -> None:
    folder = saved_under_fsdp(family)
    assert_same_answers(answers_of(folder), expected[family])
    other = with_other(with_other(checkpoints[family], tmp_path / "first"), tmp_path / "both", module="vae")
    with Engine(other, device="cpu", dtype="float32") as engine:
        for module in ("transformer", "vae"):
            assert engine.weights_checksum(module) != expected[family][1][module]
            engine.update_weights_from_disk(folder, module=module)
            assert engine.weights_checksum(module) == expected[family][1][module]


@pytest.mark.parametrize("prefix", ["FSDP", "Replicate", "DDP", "ReplicateFSDP"])
def test_what_is_under_the_wrapper_is_still_checked(prefix: str, z_image_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(z_image_checkpoint / "transformer", tmp_path / "transformer")
    with Engine(z_image_checkpoint, device="cpu") as engine:
        edit_config(tmp_path / "transformer", _class_name=f"{prefix}ZImageTransformer2DModel")
        engine.update_weights_from_disk(tmp_path)
        for name in (f"{prefix}QwenImageTransformer2DModel", f"X{prefix}ZImageTransformer2DModel", prefix, 3, None):
            edit_config(tmp_path / "transformer", _class_name=name)
            with pytest.raises(WeightsRejectedError, match=f"must be of a ZImageTransformer2DModel, got {name}"):
                engine.update_weights_from_disk(tmp_path)


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_variant_alone_is_taken(
    family: str,
    max_shard_size: str,
    checkpoints: dict[str, Path],
    expected: dict[str, tuple[Rollout, dict[str, str]]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "variant"
    DiffusionPipeline.from_pretrained(checkpoints[family]).save_pretrained(
        folder, variant="fp16", max_shard_size=max_shard_size
    )
    names = [path.name for path in folder.rglob("*.safetensors")]
    assert all(".fp16" in name for name in names) and (len(names) > 10) == (max_shard_size == "100KB")
    assert_same_answers(answers_of(folder), expected[family])
    other = with_other(checkpoints[family], tmp_path / "other")
    with Engine(other, device="cpu", dtype="float32") as engine:
        engine.update_weights_from_disk(folder)
        assert engine.weights_checksum() == expected[family][1]["transformer"]
        engine.update_weights_from_disk(folder / "vae", module="vae")


NOT_READ = (
    "README.md",
    "model.safetensors",
    "{}/pytorch_model.bin",
    "{}/model.fp16-00001-of-00002.safetensors",
    "{}/model.safetensors.index.fp16.json",
    "{}/diffusion_pytorch_model.fp16.safetensors",
    "{}/config.json.bak",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_beside_the_checkpoints_own_are_not_read(
    family: str, checkpoints: dict[str, Path], expected: dict[str, tuple[Rollout, dict[str, str]]], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints[family], folder)
    for name in NOT_READ:
        for component in COMPONENTS:
            (folder / name.format(component)).write_text("This is not read.")
    in_shards(folder / "transformer", 3)
    assert_same_answers(answers_of(folder), expected[family])


def rename(folder: Path, *names: str) -> None:
    """Keeps the weights of a module under these names alone."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_bytes(data)


PLAIN = "diffusion_pytorch_model"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two variants": (
        lambda folder: rename(folder, f"{PLAIN}.fp16.safetensors", f"{PLAIN}.bf16.safetensors"),
        "must hold the weights of one variant, got the variants bf16, fp16; remove all but one",
    ),
    "shards without an index": (
        lambda folder: rename(folder, f"{PLAIN}.fp16-00001-of-00002.safetensors"),
        r"must hold \.safetensors weights, got diffusion_pytorch_model\.fp16-00001-of-00002\.safetensors; copy",
    ),
    "another kind": (
        lambda folder: rename(folder, f"{PLAIN}.fp16.bin"),
        r"must hold \.safetensors weights, got diffusion_pytorch_model\.fp16\.bin; .* save it again with save_pretrained",
    ),
    "nothing": (lambda folder: rename(folder), r"must hold \.safetensors weights, got none; copy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_chosen_are_named(case: str, z_image_checkpoint: Path, tmp_path: Path) -> None:
    edit, words = REFUSED[case]
    folder = tmp_path / "z_image"
    shutil.copytree(z_image_checkpoint, folder)
    with Engine(folder, device="cpu") as engine:
        edit(folder / "transformer")
        with pytest.raises(WeightsRejectedError, match=words):
            engine.update_weights_from_disk(folder)
    with pytest.raises(CheckpointError, match=words):
        Engine(folder, device="cpu")


def test_plain_weights_win_over_a_variant(z_image_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_other(z_image_checkpoint, tmp_path / "z_image")
    sums = answers_of(folder)[1]
    # Another set of weights, which diffusers would take only if it were asked for it.
    shutil.copy(z_image_checkpoint / "transformer" / WEIGHTS, folder / "transformer" / f"{PLAIN}.fp16.safetensors")
    assert answers_of(folder)[1] == sums
    in_shards(folder / "transformer", 2)
    assert answers_of(folder)[1] == sums


def test_a_snapshot_in_a_hub_cache_starts_and_its_files_are_updates(
    z_image_checkpoint: Path, expected: dict[str, tuple[Rollout, dict[str, str]]], tmp_path: Path
) -> None:
    snapshot = as_hub_cache(z_image_checkpoint, tmp_path / "hub")
    assert not (snapshot / "transformer" / WEIGHTS).resolve().suffix
    assert_same_answers(answers_of(snapshot), expected["z_image"])
    other = with_other(z_image_checkpoint, tmp_path / "other")
    for given in (snapshot, snapshot / "transformer", snapshot / "transformer" / WEIGHTS):
        with Engine(other, device="cpu", dtype="float32") as engine:
            engine.update_weights_from_disk(given)
            assert engine.weights_checksum() == expected["z_image"][1]["transformer"]


def test_a_file_is_judged_by_the_name_given_or_by_its_own(z_image_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(z_image_checkpoint / "transformer" / WEIGHTS, tmp_path / "step.safetensors")
    (tmp_path / "latest").symlink_to(tmp_path / "step.safetensors")
    (tmp_path / "step.bin").write_bytes((tmp_path / "step.safetensors").read_bytes())
    (tmp_path / "link.bin").symlink_to(tmp_path / "step.bin")
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.update_weights_from_disk(tmp_path / "latest")
        for name in ("step.bin", "link.bin"):
            with pytest.raises(WeightsRejectedError, match=rf"{name} must be a \.safetensors file or a folder"):
                engine.update_weights_from_disk(tmp_path / name)
