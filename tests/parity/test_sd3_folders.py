"""Checkpoint folders of Stable Diffusion 3 as people have them load with the pipeline's bits, or are refused with a remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.sd3 import REQUEST, edit_json, edited, latents_of, load
from tests.weights import in_shards
from transformers import SiglipVisionConfig, SiglipVisionModel

from flowroll.engine import Engine
from flowroll.errors import CheckpointError, FlowrollError, UnsupportedModelError
from flowroll.testing import make_checkpoint

INDEX, TEXT = "model_index.json", "model.safetensors"


def as_on_the_hub(folder: Path) -> dict[str, Any]:
    """Writes the folder as older libraries did: shards, fewer options, CLIP's vocabularies in two files, tensors twice."""
    in_shards(folder / "transformer", 3)
    t5, clip = load_file(folder / "text_encoder_3" / TEXT), load_file(folder / "text_encoder" / TEXT)
    (folder / "text_encoder_3" / TEXT).unlink()
    shards = {"model-00001-of-00002.safetensors": dict(t5), "model-00002-of-00002.safetensors": {}}
    # The embeddings under their second name, and positions, which were saved once.
    shards["model-00002-of-00002.safetensors"]["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(clip, folder / "text_encoder" / TEXT, metadata={"format": "pt"})
    for name, tensors in shards.items():
        save_file(tensors, folder / "text_encoder_3" / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "text_encoder_3" / f"{TEXT}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer", "tokenizer_2"):
        file = folder / name / "tokenizer.json"
        model = json.loads(file.read_text())["model"]
        file.unlink()
        (folder / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    index = json.loads((folder / INDEX).read_text())
    for name in ("image_encoder", "feature_extractor"):
        del index[name]
    (folder / INDEX).write_text(json.dumps({**index, "tokenizer_3": ["transformers", "T5TokenizerFast"]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
    )
    return {}


def with_files_that_are_not_read(folder: Path) -> dict[str, Any]:
    for name in (
        "README.md",
        "sd3.5_medium.safetensors",
        "text_encoders/clip_l.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json.bak",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("This is not read.")
    return {}


def in_sixteen_bits(dtype: str, variant: str) -> Callable[[Path], dict[str, Any]]:
    def save(folder: Path) -> dict[str, Any]:
        pipeline = load(folder, dtype)
        shutil.rmtree(folder)
        pipeline.save_pretrained(folder, variant=variant, max_shard_size="100KB")
        return {"variant": variant}

    return save


def without_the_encoder_alone(folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder / "text_encoder_3")
    edit_json(folder / INDEX, text_encoder_3=[None, None])
    return {"text_encoder_3": None}


def with_parts_that_are_not_used(folder: Path) -> dict[str, Any]:
    """Adds the parts of an image adapter, as a pipeline has them that was loaded with some, and one that nobody knows."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder / "image_encoder")
    parts = {
        "image_encoder": ["transformers", "SiglipVisionModel"],
        "feature_extractor": ["transformers", "SiglipImageProcessor"],
        "watermarker": ["somewhere", "Watermarker"],
    }
    edit_json(folder / INDEX, **parts)
    return dict.fromkeys(parts)


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "as on the hub": as_on_the_hub,
    "with files that are not read": with_files_that_are_not_read,
    "float16, its variant alone": in_sixteen_bits("float16", "fp16"),
    "bfloat16, its variant alone": in_sixteen_bits("bfloat16", "bf16"),
    "without the encoder of T5 alone": without_the_encoder_alone,
    "with parts that are not used": with_parts_that_are_not_used,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_folder_has_the_pipelines_bits(checkpoints: dict[str, Path], tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["sd3"], folder)
    options = LAYOUTS[layout](folder)
    expected = latents_of(load(folder, **options), num_inference_steps=2, guidance_scale=4.0)
    with Engine(folder, device="cpu", dtype="float32") as engine:
        assert set(engine.modules) <= {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
        assert ("text_encoder_3" in engine.modules) == ("text_encoder_3" not in options)
        (found,) = engine.generate(**REQUEST, seed=7, num_inference_steps=2, guidance_scale=4.0)
    assert torch.equal(found.latents, expected)


REFUSED: dict[str, tuple[str, dict[str, Any], type[FlowrollError], str]] = {
    "no tokenizer for T5": (
        INDEX,
        {"tokenizer_3": [None, None]},
        CheckpointError,
        "name the class of tokenizer_3, which text_encoder_3 needs, got none; save the checkpoint with both, or without",
    ),
    "T5 in eight bits": (
        "text_encoder_3/config.json",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        UnsupportedModelError,
        "plain floats, got quantization_config .* dequantize it",
    ),
    "for inpainting": (
        INDEX,
        {"_class_name": "StableDiffusion3InpaintPipeline"},
        UnsupportedModelError,
        r"StableDiffusion3Pipeline \(sd3\).*, got StableDiffusion3InpaintPipeline; use a checkpoint of one of these",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused(checkpoints: dict[str, Path], tmp_path: Path, case: str) -> None:
    file, values, error, words = REFUSED[case]
    folder = edited(checkpoints["sd3"], tmp_path / "model", file, **values)
    with pytest.raises(error, match=words):
        Engine(folder, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"joint_attention_dim": 96},
            r"give encoder_hidden_states of shape \[333, 96\], .* got \[333, 64\]; save the transformer",
        ),
        (
            {"pooled_projection_dim": 40},
            r"give pooled_projections of shape \[40\], .* got \[48\]; save the transformer with the",
        ),
        ({"out_channels": 8}, "out_channels must be in_channels = 16 for sd3, got 8; use a text-to-image checkpoint"),
    ],
)
def test_a_transformer_that_does_not_fit_its_text_encoders_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    folder = make_checkpoint("sd3", tmp_path, **options)
    with pytest.raises(FlowrollError, match=words):
        Engine(folder, device="cpu")


@pytest.mark.parametrize("name", ["text_encoder_2", "tokenizer"])
def test_a_component_that_the_family_needs_is_missed_before_anything_is_loaded(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = edited(checkpoints["sd3"], tmp_path / "model", INDEX, **{name: [None, None]})
    with pytest.raises(CheckpointError, match=rf"model_index\.json must name the class of {name}, got none"):
        Engine(folder, device="cpu")
