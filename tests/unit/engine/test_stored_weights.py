"""A checkpoint is loaded as it is meant or not at all: no tensor is passed over, none is read in a dtype of another meaning.

The loaders of diffusers and transformers pass over tensors that they do not know and cast whatever they find: weights in 8-bit
floats, whose scales lie beside them, load as another model.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.unit.cli.invoking import assert_one_line_error, run_cli
from tests.unit.engine.test_loading import TensorMesh
from tests.weights import in_shards
from torch import Tensor

from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_component, load_transformer
from flowroll.errors import CheckpointError, FlowrollError, UnsupportedModelError
from flowroll.families import FAMILIES

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
REQUEST: dict[str, Any] = {"prompt": "a cat", "seed": 1, "height": 64, "width": 64, "num_inference_steps": 1}


@pytest.fixture(params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be spoilt."""
    shutil.copytree(checkpoints[request.param], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def z_folder(z_image_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(z_image_checkpoint, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, component: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / component / FILES[component]
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def a_matrix(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("weight") and tensors[name].dim() == 2)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def as_fp8(tensors: dict[str, Tensor], *, scaled: bool) -> dict[str, Tensor]:
    """The way in which 8-bit checkpoints are published: every matrix scaled to the range of its dtype, the scale beside it."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            found[name] = tensor
            continue
        scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        found[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if scaled:
            found[name.removesuffix("weight") + "scale_weight"] = scale
    return found


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("scaled", [True, False])
def test_weights_in_8_bit_floats_are_refused(folder: Path, component: str, scaled: bool) -> None:
    edit(
        folder,
        component,
        lambda tensors: as_fp8(tensors, scaled=scaled) | {"spare.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)},
    )
    with pytest.raises(CheckpointError, match=f"{component}/.* in one of F64, F32, F16, BF16, got F8_E4M3; dequantize it"):
        Engine(folder, device="cpu")


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("name", ["proj.scale_weight", "scaled_fp8", "lm_head_2.weight", "model.diffusion_model.x.weight"])
def test_a_tensor_that_the_class_does_not_know_is_refused(folder: Path, component: str, name: str) -> None:
    edit(folder, component, lambda tensors: {**tensors, name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"{component} must hold the weights of \w+ alone, got others: .*{name}; "):
        Engine(folder, device="cpu")


@pytest.mark.parametrize("component", FILES)
def test_a_weight_that_is_missing_is_refused(folder: Path, component: str) -> None:
    edit(
        folder,
        component,
        lambda tensors: (
            {name: tensors[name] for name in tensors if name != a_matrix(tensors)}
            if any(t.dim() == 2 for t in tensors.values())
            else dict(list(tensors.items())[1:])
        ),
    )
    with pytest.raises(CheckpointError, match=rf"{component} must hold every weight of \w+, got none for "):
        Engine(folder, device="cpu")


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.int64, "I64"), (torch.uint8, "U8"), (torch.int8, "I8"), (torch.bool, "BOOL")]
)
def test_weights_in_integers_are_refused(z_folder: Path, component: str, dtype: torch.dtype, words: str) -> None:
    edit(z_folder, component, lambda tensors: {**tensors, a_matrix(tensors): tensors[a_matrix(tensors)].to(dtype)})
    with pytest.raises(CheckpointError, match=f"in one of F64, F32, F16, BF16, got {words}"):
        Engine(z_folder, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_of_the_engine_is_taken(z_folder: Path, z_image_checkpoint: Path, dtype: torch.dtype) -> None:
    for component in FILES:
        edit(z_folder, component, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    with Engine(z_folder, device="cpu") as engine, Engine(z_image_checkpoint, device="cpu") as usual:
        for name, weight in usual._model.transformer.named_parameters():
            assert torch.equal(engine._model.transformer.get_parameter(name), weight.to(dtype).to(torch.float32))
        engine.generate(**REQUEST)


def test_tensors_that_transformers_passes_over_are_passed_over(z_folder: Path, z_image_checkpoint: Path) -> None:
    # Older releases stored buffers, and a model with a head in front of its names has the same weights.
    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return {
            **renamed,
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "lm_head.weight": tensors["embed_tokens.weight"].clone(),
        }

    edit(z_folder, "text_encoder", older)
    edit_json(z_folder / "text_encoder" / "config.json", architectures=["Qwen3ForCausalLM"])
    with Engine(z_folder, device="cpu") as engine, Engine(z_image_checkpoint, device="cpu") as usual:
        assert torch.equal(engine.generate(**REQUEST)[0].image, usual.generate(**REQUEST)[0].image)
    # Without the word of the class that has such a head, nobody knows what it is.
    edit_json(z_folder / "text_encoder" / "config.json", architectures=["Qwen3Model"])
    with pytest.raises(CheckpointError, match=r"Qwen3Model alone, got others: lm_head.weight"):
        Engine(z_folder, device="cpu")


def _tiny_t5() -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=32, architectures=["T5ForConditionalGeneration"]
    )
    return transformers.T5EncoderModel(config)


def _tiny_clip() -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, projection_dim=8
    )
    return transformers.CLIPTextModelWithProjection(config)


@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (_tiny_t5, lambda tensors: {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}),
        (_tiny_t5, lambda tensors: {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(8, 16)}),
        (_tiny_clip, lambda tensors: {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    ],
)
def test_text_encoders_of_other_families_load_as_they_are_published(
    z_folder: Path, build: Callable[[], Any], extra: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    model, place = build().eval(), z_folder / "text_encoder"
    shutil.rmtree(place)
    model.save_pretrained(place)
    index = json.loads((z_folder / "model_index.json").read_text())
    edit_json(z_folder / "model_index.json", text_encoder=["transformers", type(model).__name__])
    assert index["text_encoder"] != ["transformers", type(model).__name__]
    edit(z_folder, "text_encoder", lambda tensors: {**tensors, **extra(tensors)})
    loaded = load_component(examine_checkpoint(z_folder, variant=None), "text_encoder", torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    edit(z_folder, "text_encoder", lambda tensors: {**tensors, "encoder.block.0.scale_weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"got others: encoder.block.0.scale_weight"):
        load_component(examine_checkpoint(z_folder, variant=None), "text_encoder", torch.float32)


@pytest.mark.parametrize("degree", [1, 2])
def test_ranks_pass_over_what_a_class_declares_and_refuse_the_rest(
    z_folder: Path, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import ZImageTransformer2DModel

    edit(z_folder, "transformer", lambda tensors: {**tensors, "old.buffer": torch.ones(1)})
    mesh: Any = TensorMesh(0, degree)
    with pytest.raises(CheckpointError, match=r"ZImageTransformer2DModel alone, got others: old.buffer"):
        load_transformer(examine_checkpoint(z_folder, variant=None), torch.float32, mesh)
    monkeypatch.setattr(ZImageTransformer2DModel, "_keys_to_ignore_on_load_unexpected", ["old"])
    part = load_transformer(examine_checkpoint(z_folder, variant=None), torch.float32, mesh)
    assert not any(parameter.is_meta for parameter in part.parameters())
    edit(z_folder, "transformer", lambda tensors: {**tensors, a_matrix(tensors): tensors[a_matrix(tensors)].long()})
    with pytest.raises(CheckpointError, match="got I64 for"):
        load_transformer(examine_checkpoint(z_folder, variant=None), torch.float32, mesh)


def _twice(folder: Path) -> None:
    first, second = in_shards(folder / "transformer", 2)
    save_file({**load_file(second), **dict(list(load_file(first).items())[:1])}, second)


def _beside_the_index(folder: Path) -> None:
    # diffusers looks for surplus tensors in the index alone.
    first, _ = in_shards(folder / "transformer", 2)
    save_file({**load_file(first), "proj.scale_weight": torch.ones(1)}, first)


def _only_in_the_index(folder: Path) -> None:
    first, _ = in_shards(folder / "transformer", 2)
    save_file(dict(list(load_file(first).items())[1:]), first)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (_twice, CheckpointError, "must hold every weight once, got"),
        (_beside_the_index, CheckpointError, "must list the tensors of its files, got a difference in proj.scale_weight"),
        (_only_in_the_index, CheckpointError, "must list the tensors of its files"),
        *(
            (
                lambda folder, name=name: edit_json(folder / name / "config.json", quantization_config={"quant_method": "fp8"}),
                UnsupportedModelError,
                f"{name}/config.json must be of a model in plain floats, got quantization_config = .*fp8",
            )
            for name in FILES
        ),
        (
            lambda folder: edit_json(folder / "text_encoder/config.json", transformers_weights="other.safetensors"),
            UnsupportedModelError,
            "plain floats, got transformers_weights",
        ),
        (
            lambda folder: edit_json(folder / "text_encoder/config.json", text_config={"quantization_config": {"bits": 4}}),
            UnsupportedModelError,
            "plain floats, got quantization_config",
        ),
        (
            lambda folder: (folder / "text_encoder/adapter_config.json").write_text("{}"),
            UnsupportedModelError,
            "text_encoder must hold a model without an adapter",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
            UnsupportedModelError,
            "scheduler must be FlowMatchEulerDiscreteScheduler, got DDIMScheduler",
        ),
        (
            lambda folder: edit_json(
                folder / "scheduler/scheduler_config.json",
                use_dynamic_shifting=True,
                max_image_seq_len=256,
                base_image_seq_len=256,
            ),
            CheckpointError,
            r"max_image_seq_len must differ from base_image_seq_len \(256\), got 256; ",
        ),
        (
            lambda folder: edit_json(folder / "scheduler/scheduler_config.json", shift=0),
            CheckpointError,
            "scheduler option shift must be above 0, got 0",
        ),
    ],
)
def test_what_would_load_otherwise_than_it_is_saved_is_refused(
    z_folder: Path, spoil: Callable[[Path], None], error: type[FlowrollError], words: str
) -> None:
    spoil(z_folder)
    with pytest.raises(error, match=words):
        Engine(z_folder, device="cpu")


def test_where_there_are_two_sets_of_files_those_that_the_library_reads_are_looked_at(z_folder: Path) -> None:
    place = z_folder / "text_encoder"
    shutil.copy(place / "model.safetensors", place / "model-1.safetensors")
    names = load_file(place / "model.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    shutil.copy(place / "model.safetensors", place / "diffusion_pytorch_model.safetensors")
    edit(
        z_folder,
        "text_encoder",
        lambda tensors: {**tensors, a_matrix(tensors): tensors[a_matrix(tensors)].to(torch.float8_e5m2)},
    )
    with pytest.raises(CheckpointError, match=r"text_encoder/model.safetensors must hold .* got F8_E5M2"):
        Engine(z_folder, device="cpu")


def test_the_command_line_ends_with_the_reason(z_folder: Path, tmp_path: Path) -> None:
    edit(z_folder, "vae", lambda tensors: {**tensors, "decoder.conv_in.scale_weight": torch.ones(1)})
    small = ("--prompt", "a fox", "--width", 64, "--height", 64, "--num-inference-steps", 1)
    result = run_cli("generate", z_folder, *small, "--out", tmp_path / "out")
    assert_one_line_error(result, "vae must hold the weights of AutoencoderKL alone, got others: decoder.conv_in.scale_weight")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
