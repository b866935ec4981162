"""A bad folder is one clear error, before anything is half loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.errors import CheckpointError, FlowrollError, InvalidRequestError, UnsupportedModelError
from flowroll.families import FAMILIES

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def drop(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def hide_in_a_stray_file(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, (folder / WEIGHTS).with_name("stray.safetensors"))
    drop_tensor(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda d: drop(d / "model_index.json"), CheckpointError, "model_index.json"),
        (lambda d: (d / "model_index.json").write_text("{"), CheckpointError, "JSON"),
        (lambda d: (d / "model_index.json").write_text("[]"), CheckpointError, "object"),
        (lambda d: drop(d / "vae"), CheckpointError, "vae"),
        (lambda d: drop(d / "tokenizer"), CheckpointError, "tokenizer"),
        (lambda d: drop(d / "transformer" / "config.json"), CheckpointError, "config.json"),
        (lambda d: drop(d / WEIGHTS), CheckpointError, "safetensors"),
        (lambda d: truncate(d / WEIGHTS), CheckpointError, "truncated"),
        (lambda d: (d / WEIGHTS).write_bytes(b"abc"), CheckpointError, "header"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 64), CheckpointError, "header"),
        (lambda d: drop_tensor(d / WEIGHTS), CheckpointError, "every weight"),
        (lambda d: drop(d / "scheduler" / "scheduler_config.json"), CheckpointError, "scheduler"),
        (lambda d: drop_tensor(d / "text_encoder/model.safetensors"), CheckpointError, "text_encoder must hold every weight"),
        (lambda d: drop(d / "tokenizer" / "tokenizer.json"), CheckpointError, "tokenizer.json"),
        (lambda d: drop(d / "tokenizer" / "chat_template.jinja"), CheckpointError, "must load"),
        (hide_in_a_stray_file, CheckpointError, "transformer must hold every weight"),
        (lambda d: edit_json(d / "transformer" / "config.json", n_heads=3), CheckpointError, "must load"),
        (
            lambda d: edit_json(d / "model_index.json", _class_name="SanaPipeline"),
            UnsupportedModelError,
            "QwenImagePipeline",
        ),
        (
            lambda d: edit_json(d / "scheduler" / "scheduler_config.json", use_karras_sigmas=True),
            UnsupportedModelError,
            "karras",
        ),
    ],
)
def test_a_spoilt_checkpoint_is_named(
    z_image_checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], object], error: type[FlowrollError], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(z_image_checkpoint, folder)
    spoil(folder)
    with pytest.raises(error, match=words) as caught:
        Engine(folder)
    assert "; " in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_component_that_a_family_needs_is_missed_by_its_name(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Whether the index does not name it or its folder is missing, and before anything is loaded."""
    kind, index = FAMILIES[family], json.loads((checkpoints[family] / "model_index.json").read_text())
    texts = [name for name in (*kind.text_encoders, *kind.tokenizers) if name not in kind.optional_components]
    for place, name in enumerate((*texts, "transformer", "vae", "scheduler")):
        folder = tmp_path / str(place)
        shutil.copytree(checkpoints[family], folder, ignore=shutil.ignore_patterns(name))
        with pytest.raises(CheckpointError, match=f"must hold a folder {name}, got none"):
            examine_checkpoint(folder, variant=None)
    for name in texts:
        edit_json(folder / "model_index.json", **{**index, name: [None, None]})
        with pytest.raises(CheckpointError, match=f"must name the class of {name}, got none"):
            examine_checkpoint(folder, variant=None)


def test_a_missing_shard_is_named(z_image_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(z_image_checkpoint, folder)
    index = {"metadata": {}, "weight_map": {"a": Path(WEIGHTS).name, "b": "model-00002-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        Engine(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint folder"):
        Engine(tmp_path / "nowhere")


def test_an_unsupported_pipeline_lists_what_is_supported(z_image_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(z_image_checkpoint, folder)
    edit_json(folder / "model_index.json", _class_name="SanaPipeline")
    with pytest.raises(UnsupportedModelError) as caught:
        Engine(folder)
    for name in ("QwenImagePipeline", "ZImagePipeline", "FluxPipeline"):
        assert name in caught.value.message


def test_turbo_is_chosen_by_variant(z_image_checkpoint: Path, qwen_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint) as base, Engine(z_image_checkpoint, variant="turbo") as turbo:
        assert (base.info.variant, base.info.defaults.num_inference_steps) == ("base", 50)
        assert (turbo.info.variant, turbo.info.defaults.num_inference_steps) == ("turbo", 9)
        assert turbo.info.defaults.guidance_scale == 0
        record = turbo.rollout(prompt="a bowl", height=64, width=64)[0].sampling
        assert (record.variant, record.num_inference_steps, record.guidance_rule) == ("turbo", 9, "none")
    with pytest.raises(UnsupportedModelError, match="base"):
        Engine(qwen_checkpoint, variant="turbo")


@pytest.mark.parametrize(
    ("options", "field"),
    [({"dtype": "int8"}, "dtype"), *(({"device": name}, "device") for name in ("warp", "meta", "mps", "cuda:99"))],
)
def test_a_device_or_dtype_that_is_not_to_be_had_is_refused(z_image_checkpoint: Path, options: dict, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Engine(z_image_checkpoint, **options)
    assert caught.value.field == field


def test_the_folder_itself_can_name_its_variant(z_image_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(z_image_checkpoint, folder)
    notes = folder / "flowroll.json"
    notes.write_text('{"variant": "turbo"}')
    assert examine_checkpoint(folder, variant=None).variant == "turbo"
    assert examine_checkpoint(folder, variant="base").variant == "base"
    for text, error, words in (
        ('{"variant": "fast"}', UnsupportedModelError, "base, turbo, shapes"),
        ('{"variant": 1}', CheckpointError, "flowroll.json must be"),
        ('{"varient": "turbo"}', CheckpointError, "flowroll.json must be"),
        ("{", CheckpointError, "flowroll.json must be JSON"),
    ):
        notes.write_text(text)
        with pytest.raises(error, match=words):
            examine_checkpoint(folder, variant=None)
