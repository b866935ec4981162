import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.factories import assert_same_answer, make_evaluation, make_record, make_rollout

from flowroll import Rollout, SamplingRecord
from flowroll.errors import RolloutFileError
from flowroll.types import Branch
from flowroll.wire import files
from flowroll.wire.files import load_rollout, save_rollout

# Of a leaf of a tree that a run from given latents to a step before the end grew.
PART: dict[str, Any] = {
    "init_seed": None,
    "sde_seed": 7,
    "start_step": 1,
    "stop_step": 3,
    "latents_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "branches": (
        Branch(step=1, parent="0", id="0/3", sde_seed=2**32 - 1),
        Branch(step=2, parent="0/3", id="0/3/0", sde_seed=5),
    ),
}


def test_a_record_from_before_these_fields_is_that_of_a_whole_run() -> None:
    sent = msgspec.to_builtins(make_record())
    for name in PART:
        del sent[name]
    assert msgspec.convert(sent, SamplingRecord) == make_record()
    assert make_record().steps_run == range(4) and replace(make_record(), **PART).steps_run == range(1, 3)


@pytest.mark.parametrize(
    "rollout",
    [
        make_rollout(),
        make_rollout(family="z_image", dtype=torch.float16),
        make_rollout(guided=False, dtype=torch.float32, text_tokens=3),
        make_rollout(sampling=replace(make_record(), **PART)),
        make_evaluation(),
        *(make_evaluation(image_format=image_format) for image_format in ("uint8", "png", "none")),
    ],
    ids=["qwen_image", "z_image", "unguided", "part", "evaluation", "uint8", "png", "none"],
)
def test_a_rollout_comes_back_equal_in_every_field(rollout: Rollout, tmp_path: Path) -> None:
    save_rollout(tmp_path / "a.safetensors", rollout)
    assert_same_answer(rollout, load_rollout(tmp_path / "a.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_views_that_share_storage_can_be_saved(tmp_path: Path) -> None:
    states = torch.arange(10.0)
    rollout = make_evaluation(log_probs=states[:8:2], image=torch.rand(32, 48, 1, 3).permute(3, 2, 0, 1))
    save_rollout(tmp_path / "a", rollout)
    assert_same_answer(rollout, load_rollout(tmp_path / "a"))


def test_the_file_is_plain_safetensors_with_json_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_rollout(path, make_rollout())
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
    assert {"generated_output", "rollout_log_probs", "dit_trajectory.latents"} <= names
    assert "denoising_env.pos_cond_kwargs.encoder_hidden_states" in names
    assert metadata["flowroll.schema_version"] == "1"
    content = json.loads(metadata["flowroll.rollout"])
    assert content["seed"] == 0 and content["sampling"]["family"] == "qwen_image"
    assert content["dit_trajectory"]["latents"] == {"__tensor__": "dit_trajectory.latents"}


def test_every_tensor_in_the_file_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_rollout(path, make_rollout(text_tokens=7))
    whole = path.read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    assert header_bytes % 8 == 0
    header = json.loads(whole[8 : 8 + header_bytes])
    del header["__metadata__"]
    widths = {"F32": 4, "BF16": 2, "BOOL": 1}
    assert {entry["dtype"] for entry in header.values()} == set(widths)
    for entry in header.values():
        assert entry["data_offsets"][0] % widths[entry["dtype"]] == 0


def test_loaded_tensors_are_the_callers_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rollout = make_rollout()
    save_rollout(path, rollout)
    loaded = load_rollout(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_answer(rollout, loaded)
    loaded.image.zero_()
    assert loaded.log_probs is not None and rollout.log_probs is not None
    assert torch.equal(loaded.log_probs, rollout.log_probs)


def test_saving_replaces_a_file_only_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_rollout(path, make_rollout(seed=1))
    save_rollout(path, make_rollout(seed=2))
    assert load_rollout(path).seed == 2

    def full_disk(tensor: Any) -> memoryview:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "tensor_bytes", full_disk)
    with pytest.raises(RolloutFileError, match=r"path must be writable, got .* \(No space left on device\); "):
        save_rollout(path, make_rollout(seed=3))
    assert load_rollout(path).seed == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path) -> None:
    target = tmp_path / "sample.safetensors"
    save_rollout(target, make_rollout(seed=1))
    before = target.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel refuses the write half-way, as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        with pytest.raises(RolloutFileError, match="free some space"):
            save_rollout(target, make_rollout(seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_a_file_from_before_the_record_had_digests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rollout = make_rollout()
    save_rollout(path, rollout)
    whole = path.read_bytes()
    for name in (b"pos", b"neg"):
        field = rb",\"" + name + rb"_cond_sha256\":null"
        assert field in whole
        # Spaces keep the lengths, and mean nothing.
        whole = whole.replace(field, b" " * len(field))
    path.write_bytes(whole)
    loaded = load_rollout(path)
    assert_same_answer(rollout, loaded)
    assert loaded.sampling.pos_cond_sha256 is loaded.sampling.neg_cond_sha256 is None


@pytest.mark.parametrize("place", ["missing/a.safetensors", "."])
def test_a_place_that_cannot_be_written_is_a_clear_error(place: str, tmp_path: Path) -> None:
    with pytest.raises(RolloutFileError, match="path must be writable, got "):
        save_rollout(tmp_path / place, make_evaluation())


@pytest.mark.parametrize("place", ["missing.safetensors", "."])
def test_a_missing_file_is_a_clear_error(place: str, tmp_path: Path) -> None:
    with pytest.raises(RolloutFileError, match="path must be a readable rollout file, got "):
        load_rollout(tmp_path / place)


def test_a_file_cut_anywhere_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_rollout(path, make_evaluation(height=16, width=16))
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RolloutFileError, match=r"path must be a whole rollout file, got .*; "):
            load_rollout(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b'schema_version":"1"',
            b'schema_version":"2"',
            "flowroll.schema_version must be at most 1, got 2 in .*; read it with a later flowroll",
        ),
        (b'"flowroll.schema_version', b'"flowrolf.schema_version', "has no flowroll.schema_version"),
        (b'"flowroll.rollout"', b'"flowroll.rolloux"', "must be a whole rollout file"),
        (b'"generated_output":{"dtype"', b'"generated_outpux":{"dtype"', "must be a whole rollout file"),
        (rb"{\"request_id\"", rb"[\"request_id\"", "must be a whole rollout file"),
        (rb"\"schema_version\":1", rb"\"schema_version\":3", "schema_version 3"),
    ],
)
def test_a_damaged_or_foreign_header_is_a_clear_error(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_rollout(path, make_evaluation())
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(RolloutFileError, match=message):
        load_rollout(path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(RolloutFileError, match="use a file that save_rollout wrote"):
        load_rollout(tmp_path / "a.safetensors")
