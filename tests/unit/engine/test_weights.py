"""New weights from disk: as a fresh start on them, or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.guiding import PicturedEngine
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, WEIGHTS, change, edit_config, edit_header, in_shards, with_other

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.weights import staged as weights
from flowroll.engine.weights.tensorfile import TensorFile
from flowroll.engine.weights.versions import VersionState, WeightVersions
from flowroll.errors import (
    InvalidRequestError,
    OutdatedWeightsError,
    ShuttingDownError,
    WeightsMismatchError,
    WeightsRejectedError,
)
from flowroll.families import FAMILIES


@pytest.fixture(scope="module")
def other(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with another transformer; read only."""
    return with_other(z_image_checkpoint, tmp_path_factory.mktemp("other") / "z_image")


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    """Shared by the tests whose update is refused."""
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def before(engine: Engine) -> tuple[Rollout, str]:
    """What that engine answers, and its checksum, before anything was tried."""
    return engine.rollout(**REQUEST)[0], engine.weights_checksum()


@pytest.fixture
def copy(other: Path, tmp_path: Path) -> Path:
    """The other transformer's folder, to be spoilt."""
    shutil.copytree(other / "transformer", tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_update_every_tensor_is_that_of_an_engine_started_on_the_new_weights(
    family: str, dtype: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other = with_other(with_other(checkpoints[family], tmp_path / "first"), tmp_path / "both", module="vae")
    with PicturedEngine(other, device="cpu", dtype=dtype) as fresh:
        (expected,) = fresh.rollout(**REQUEST)
        sums = [fresh.weights_checksum(module) for module in ("transformer", "text_encoder", "vae")]
    with PicturedEngine(checkpoints[family], device="cpu", dtype=dtype) as engine:
        (old,) = engine.rollout(**REQUEST)
        update = engine.update_weights_from_disk(other)
        assert (update.module, update.previous_version, update.weight_version) == ("transformer", "0", "1")
        engine.update_weights_from_disk(other, module="vae", weight_version="step-7")
        (new,) = engine.rollout(**REQUEST)
        assert (old.weight_version, new.weight_version) == ("0", "step-7")
        assert_same_bits(new, expected)
        assert not torch.equal(new.dit_trajectory.latents, old.dit_trajectory.latents)
        assert [engine.weights_checksum(module) for module in ("transformer", "text_encoder", "vae")] == sums
        for name, parameter in engine._model.transformer.named_parameters():
            assert parameter.requires_grad and parameter.data_ptr() % 64 == 0, name
        back = engine.update_weights_from_disk(checkpoints[family])
        engine.update_weights_from_disk(checkpoints[family], module="vae")
        assert back.num_bytes == sum(tensor.nbytes for tensor in engine._model.transformer.state_dict().values())
        assert_same_bits(engine.rollout(**REQUEST)[0], old)


@pytest.mark.parametrize("form", ["own folder", "one file", "shards", "float16", "float64", "an older config"])
def test_weights_come_in_every_form_that_a_trainer_saves(
    form: str, z_image_checkpoint: Path, copy: Path, tmp_path: Path
) -> None:
    source = copy
    if form == "one file":
        source = copy / WEIGHTS
    elif form == "shards":
        in_shards(copy, 3)
    elif form in ("float16", "float64"):
        change(copy, lambda tensors: {name: tensor.to(getattr(torch, form)) for name, tensor in tensors.items()})
    elif form == "an older config":
        config = copy / "config.json"
        config.write_text(config.read_text().replace('"siglip_feat_dim": null,', '"pooled_projection_dim": 768,'))
    whole = tmp_path / "whole"
    shutil.copytree(z_image_checkpoint, whole)
    shutil.rmtree(whole / "transformer")
    shutil.copytree(copy, whole / "transformer")
    with Engine(whole, device="cpu", dtype="bfloat16") as fresh:
        expected = fresh.weights_checksum()
    with Engine(z_image_checkpoint, device="cpu", dtype="bfloat16") as engine:
        assert engine.weights_checksum() != expected
        engine.update_weights_from_disk(source)
        assert engine.weights_checksum() == expected


def _drop(folder: Path) -> None:
    change(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "cap_embedder.1.bias"})


def _add(folder: Path) -> None:
    change(folder, lambda tensors: tensors | {"no.such.weight": torch.zeros(3)})


def _misshape_in_the_last_shard(folder: Path) -> None:
    last = in_shards(folder, 3)[-1]
    edit_header(last, lambda text: text.replace('"shape":[64,64]', '"shape":[32,128]', 1))


def _double_across_shards(folder: Path) -> None:
    first, second = in_shards(folder, 2)
    tensors = weights.TensorFile(first).stored
    from safetensors.torch import load_file, save_file

    save_file(load_file(second) | {tensors[0].name: load_file(first)[tensors[0].name]}, second)


def _double_in_a_header(folder: Path) -> None:
    def edit(text: str) -> str:
        start = text.index('"cap_embedder.1.bias":')
        stop = text.index("}", start) + 1
        return text[:stop] + "," + text[start:stop] + text[stop:]

    edit_header(folder / WEIGHTS, edit)


def _truncate_the_last_shard(folder: Path) -> None:
    last = in_shards(folder, 3)[-1]
    os.truncate(last, last.stat().st_size - 4)


def _as_integers(folder: Path) -> None:
    change(folder, lambda tensors: tensors | {"cap_embedder.1.bias": tensors["cap_embedder.1.bias"].to(torch.int32)})


def _lose_a_shard(folder: Path) -> None:
    in_shards(folder, 3)[1].unlink()


def _escape_by_the_index(folder: Path) -> None:
    in_shards(folder, 2)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("diffusion_pytorch_model-00001", "../diffusion_pytorch_model-00001"))


def _make_a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _overlap(folder: Path) -> None:
    def edit(text: str) -> str:
        header = json.loads(text)
        first, second = [name for name, entry in header.items() if entry.get("shape") == [64, 64]][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        return json.dumps(header)

    edit_header(folder / WEIGHTS, edit)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing weight": (_drop, "hold every weight of the module, got none for cap_embedder.1.bias"),
    "an unknown weight": (_add, "hold the module's weights alone, got others: no.such.weight"),
    "a weight in two shards": (_double_across_shards, "hold every weight once, got several of"),
    "a weight twice in a header": (_double_in_a_header, r"broken header \(cap_embedder.1.bias is there twice\)"),
    "a bad shape in the last shard": (_misshape_in_the_last_shard, r"as \[64, 64\], got \[32, 128\]"),
    "a truncated last shard": (_truncate_the_last_shard, "the file is truncated"),
    "a missing shard": (_lose_a_shard, "every shard, got no diffusion_pytorch_model-00002"),
    "integers": (_as_integers, "one of F64, F32, F16, BF16, got I32"),
    "an index that leads elsewhere": (_escape_by_the_index, "map weights to files beside it"),
    "overlapping tensors": (_overlap, "a gap or an overlap at"),
    "a pipe": (_make_a_pipe, "must hold .safetensors weights, got none"),
    "no header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), "broken header"),
    "an empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "broken header"),
    "a deep header": (lambda folder: edit_header(folder / WEIGHTS, lambda _: "[" * 100_000), "broken header"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "got none"),
    "another number of heads": (lambda folder: edit_config(folder, n_heads=2), "n_heads = 4, as the engine has, got 2"),
    "another class": (lambda folder: edit_config(folder, _class_name="FluxTransformer2DModel"), "must be of a ZImage"),
    "no config": (lambda folder: (folder / "config.json").write_text("[1"), "must be JSON"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_refused_update_leaves_weights_version_and_checksum(
    fault: str, engine: Engine, before: tuple[Rollout, str], copy: Path
) -> None:
    spoil, words = SPOILT[fault]
    spoil(copy)
    with pytest.raises(WeightsRejectedError, match=words) as refused:
        engine.update_weights_from_disk(copy, weight_version="never")
    assert refused.value.field == "model_path"
    assert_untouched(engine, before)


def assert_untouched(engine: Engine, before: tuple[Rollout, str]) -> None:
    assert engine.weights_checksum() == before[1]
    (after,) = engine.rollout(**REQUEST)
    assert_same_bits(after, before[0])
    assert after.weight_version == engine.weight_version == before[0].weight_version


def _fail_in_the_last_read(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    read, last = TensorFile.read_into, 73
    calls = iter(range(1, 1000))

    def read_or_fail(self: TensorFile, target: torch.Tensor, start: int) -> None:
        if next(calls) == last:
            raise error
        read(self, target, start)

    monkeypatch.setattr(TensorFile, "read_into", read_or_fail)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError("no memory left")])
def test_a_disk_that_fails_in_the_last_tensor_leaves_everything(
    error: Exception, engine: Engine, before: tuple[Rollout, str], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_in_the_last_read(monkeypatch, error)
    with pytest.raises(WeightsRejectedError, match=r"Input/output error|no memory left"):
        engine.update_weights_from_disk(other)
    monkeypatch.undo()
    assert_untouched(engine, before)


@pytest.mark.parametrize("size", ["shorter", "the same"])
def test_a_file_that_is_written_while_it_is_read_is_refused(
    size: str, engine: Engine, before: tuple[Rollout, str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, file = TensorFile.read_into, copy / WEIGHTS
    length = file.stat().st_size

    def write_and_read(self: TensorFile, target: torch.Tensor, start: int) -> None:
        with file.open("r+b") as written:
            written.seek(length - 8)
            written.write(bytes(8))
            written.truncate(length if size == "the same" else length - 8)
        os.utime(file, ns=(0, 0))
        read(self, target, start)

    monkeypatch.setattr(TensorFile, "read_into", write_and_read)
    with pytest.raises(WeightsRejectedError, match="stay as it is" if size == "the same" else "read to its end"):
        engine.update_weights_from_disk(copy)
    monkeypatch.undo()
    assert_untouched(engine, before)


def test_an_exchange_that_is_broken_off_half_way_is_undone(engine: Engine, before: tuple[Rollout, str], other: Path) -> None:
    staged = engine.stage_weights(weights.find_weights(other, "transformer"))
    live, _ = staged._pairs[40]
    staged._pairs[40] = (live, torch.zeros(3, dtype=torch.int64))  # cannot be this parameter's data
    with pytest.raises(RuntimeError):
        engine.commit_weights(staged)
    assert_untouched(engine, before)
    staged = engine.stage_weights(weights.find_weights(other, "transformer"))
    with pytest.raises(KeyboardInterrupt):
        staged.commit(_interrupt)
    assert_untouched(engine, before)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_what_can_fail_is_done_before_other_ranks_are_told_to_take_the_weights(
    engine: Engine, before: tuple[Rollout, str], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    class Told:
        """Other ranks that obey."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: told.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(engine._weights, "_executor", Told())
        patch.setattr(VersionState, "after", fail)
        with pytest.raises(MemoryError):
            engine.update_weights_from_disk(other)
    assert told == ["stage_weights", "drop_staged"]
    assert (engine.weight_version, engine.weights_checksum()) == ("0", before[1])


def test_other_modules_and_versions_that_are_no_names_are_refused_by_name(engine: Engine, other: Path) -> None:
    for module in ("text_encoder", "tokenizer", ""):
        with pytest.raises(InvalidRequestError) as refused:
            engine.update_weights_from_disk(other, module=module)
        assert refused.value.field == "module"
    for version in ("", "x" * 129, "a\nb"):
        with pytest.raises(InvalidRequestError) as refused:
            engine.update_weights_from_disk(other, weight_version=version)
        assert refused.value.field == "weight_version"
    for source in ("/no/such/folder", "\0", "x" * 5000):
        with pytest.raises(WeightsRejectedError):
            engine.update_weights_from_disk(source)
    with pytest.raises(InvalidRequestError):
        engine.weights_checksum("scheduler")


def test_a_closed_engine_takes_no_weights(z_image_checkpoint: Path, other: Path) -> None:
    engine = Engine(z_image_checkpoint, device="cpu")
    staged = engine.stage_weights(weights.find_weights(other, "transformer"))
    engine.close()
    for call in (
        lambda: engine.commit_weights(staged),
        lambda: engine.update_weights_from_disk(other),
        lambda: engine.weights_checksum(),
        lambda: engine.verify_weights([]),
    ):
        with pytest.raises(ShuttingDownError):
            call()


def test_the_checksum_is_sha256_of_sorted_names_and_raw_bytes(engine: Engine) -> None:
    digest = hashlib.sha256()
    state = engine._model.transformer.state_dict()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].numpy().tobytes())
    assert engine.weights_checksum() == digest.hexdigest() == replay.weights_checksum(engine._model.transformer)


def test_a_trainer_can_verify_every_tensor_and_hears_the_names_that_differ(engine: Engine) -> None:
    sums = replay.tensor_checksums(engine._model.transformer)
    assert engine.verify_weights(sums.items()) == len(sums) == 73
    assert engine.verify_weights((name, digest.upper()) for name, digest in sums.items()) == 73
    wrong = list({**sums, "x_pad_token": "0" * 64, "no.such": "1"}.items())
    wrong = [pair for pair in wrong if pair[0] != "cap_pad_token"] + [("cap_embedder.1.bias", sums["cap_embedder.1.bias"])]
    with pytest.raises(WeightsMismatchError) as refused:
        engine.verify_weights(wrong)
    for words in ("doubled: cap_embedder.1.bias", "unknown: no.such", "missing: cap_pad_token", "different: x_pad_token"):
        assert words in refused.value.message


def test_versions_are_counted_from_the_highest_number() -> None:
    versions = WeightVersions()
    counted = []
    for given in (None, "7", None, "3", None, "step-1", None, "007", None):
        version = versions.state.following(given)
        versions.advance(version)
        counted.append(version)
    assert counted == ["1", "7", "8", "3", "9", "step-1", "10", "007", "11"]


@pytest.mark.parametrize(
    ("history", "met", "refused"),
    [
        ([], ["0"], ["1", "step-1"]),
        (["1", "2"], ["0", "1", "2"], ["3", "10"]),
        (["9", "10"], ["2", "9", "10"], ["11"]),
        (["5", "3"], ["3", "1"], ["5", "4"]),
        (["a", "b"], ["0", "a", "b"], ["1", "c"]),
        (["a", "4"], ["a", "4", "3"], ["b", "5"]),
    ],
)
def test_a_demanded_version_is_met_by_its_number_or_by_its_arrival(
    history: list[str], met: list[str], refused: list[str]
) -> None:
    versions = WeightVersions()
    for version in history:
        versions.advance(version)
    versions.demand(None)
    for minimum in met:
        versions.demand(minimum)
    for minimum in refused:
        with pytest.raises(OutdatedWeightsError, match=f"of version {minimum} or later, got {versions.current}"):
            versions.demand(minimum)


def test_a_request_can_demand_a_version_when_it_is_planned_and_when_it_runs(z_image_checkpoint: Path, other: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        with pytest.raises(OutdatedWeightsError):
            engine.rollout(**REQUEST, min_weight_version="1")
        engine.update_weights_from_disk(other, weight_version="5")
        from flowroll import SamplingParams

        plan = engine.plan(SamplingParams(**REQUEST, min_weight_version="5"))
        assert engine.rollout(plan)[0].weight_version == "5"
        engine.update_weights_from_disk(other, weight_version="4")
        with pytest.raises(OutdatedWeightsError):
            engine.rollout(plan)
