import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.guiding import PICTURE, opened, pictured_pipeline, takes_images

from flowroll.engine.loading import modules_of
from flowroll.errors import CheckpointError, InvalidRequestError
from flowroll.families import FAMILIES, Prompt, family_of_pipeline
from flowroll.testing import make_checkpoint
from flowroll.testing.tokenizer import QWEN_IMAGE_PREFIX, make_tokenizer

CLASSES = {
    "qwen_image": {
        "_class_name": "QwenImagePipeline",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
    "z_image": {
        "_class_name": "ZImagePipeline",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
    "sd3": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "image_encoder": "NoneType",
        "feature_extractor": "NoneType",
    },
    "flux": {
        "_class_name": "FluxPipeline",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5Tokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "image_encoder": "NoneType",
        "feature_extractor": "NoneType",
    },
    "flux2": {
        "_class_name": "Flux2KleinPipeline",
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "Qwen2Tokenizer",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
    "qwen_image_21": {
        "_class_name": "QwenImage21Pipeline",
        "transformer": "QwenImage21Transformer2DModel",
        "vae": "AutoencoderKLQwenImage21",
        "text_encoder": "Qwen3VLForConditionalGeneration",
        "processor": "Qwen3VLProcessor",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
    "qwen_image_edit": {
        "_class_name": "QwenImageEditPlusPipeline",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "processor": "Qwen2VLProcessor",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
}
GUIDED = {
    "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "z_image": {"guidance_scale": 4.0},
    "sd3": {"guidance_scale": 4.0},
    "flux": {"guidance_scale": 3.5, "true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    "flux2": {"guidance_scale": 4.0},
    "qwen_image_21": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    "qwen_image_edit": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
}
NON_LATIN = "一只红色的猫 ظل القمر 🌈 лес"


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, checkpoints):
    return checkpoints[family]


def load(folder, dtype=torch.float32):
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pictured_pipeline(family_of_pipeline(type(pipeline).__name__).name, pipeline)


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def embed(pipeline, prompt):
    family = family_of_pipeline(type(pipeline).__name__)
    images = (opened(PICTURE),) if takes_images(family.name) else ()
    return family.encode(pipeline, Prompt(text=prompt, images=images))[family.embeds_key]


def test_a_saved_checkpoint_loads_as_the_real_classes(family, checkpoint):
    pipeline = load(checkpoint)
    names = {"_class_name": type(pipeline).__name__} | {
        name: type(component).__name__ for name, component in pipeline.components.items()
    }
    assert names == CLASSES[family]


def test_a_saved_checkpoint_survives_another_round_trip(family, checkpoint, tmp_path):
    pipeline = load(checkpoint)
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name in modules_of(pipeline):
        first, second = getattr(pipeline, name).state_dict(), getattr(again, name).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_runs_on_it(family, checkpoint, dtype):
    pipeline = load(checkpoint, dtype)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        prompt="a red cube",
        height=64,
        width=64,
        num_inference_steps=2,
        generator=generator,
        output_type="pt",
        **GUIDED[family],
    ).images
    colors = 4 if family == "qwen_image_21" else 3
    assert image.shape == (1, colors, 64, 64)
    assert image.isfinite().all()
    assert image.std() > 0.05


def test_every_weight_is_finite_and_none_is_constant_zero(checkpoint):
    pipeline = load(checkpoint)
    for module in modules_of(pipeline).values():
        for key, weight in module.named_parameters():
            assert weight.isfinite().all(), key
            assert weight.any(), key


def test_velocities_are_of_order_one(family, checkpoint):
    pipeline, seen = load(checkpoint), []
    step = pipeline.scheduler.step

    def spy(velocity, *args, **kwargs):
        seen.append(velocity.float().std().item())
        return step(velocity, *args, **kwargs)

    pipeline.scheduler.step = spy
    # The branches of FLUX.1 differ so much that guidance at 4 makes velocities of up to four; the model's own are looked at.
    guidance = {"guidance_scale": 1.0} if family == "flux" else GUIDED[family]
    pipeline(prompt="a red cube", height=128, width=128, num_inference_steps=4, output_type="latent", **guidance)
    assert len(seen) == 4
    assert all(0.5 < value < 2.0 for value in seen), seen


def test_the_prompt_changes_the_picture_even_among_hundreds_of_image_tokens(family, checkpoint):
    pipeline = load(checkpoint)

    def latents(prompt):
        generator = torch.Generator().manual_seed(0)
        output = pipeline(
            prompt=prompt, height=256, width=256, num_inference_steps=2, generator=generator, output_type="latent"
        )
        return output.images

    red, blue = latents("a red cube"), latents("a blue cube")
    assert (red - blue).abs().mean() > 0.01 * red.abs().mean()


def test_different_prompts_give_different_embeddings(checkpoint):
    pipeline = load(checkpoint)
    red, blue = embed(pipeline, "a red cube"), embed(pipeline, "a blue cube")
    assert red.shape == blue.shape
    assert (red - blue).abs().max() > 0.1


@pytest.mark.parametrize("prompt", ["", NON_LATIN, "a" * 4_000], ids=["empty", "non-latin", "4,000 characters"])
def test_any_text_can_be_encoded(checkpoint, prompt):
    embeds = embed(load(checkpoint), prompt)
    assert embeds.shape[0] > 0
    assert embeds.isfinite().all()


def test_non_latin_text_survives_the_tokenizer():
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer(NON_LATIN).input_ids) == NON_LATIN


def test_the_qwen_image_prefix_is_34_tokens_as_for_the_real_tokenizer(qwen_checkpoint):
    pipeline = load(qwen_checkpoint)
    assert pipeline.prompt_template_encode.startswith(QWEN_IMAGE_PREFIX + "{}")
    prefix = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(prefix).input_ids) == pipeline.prompt_template_encode_start_idx == 34


def test_the_chat_template_says_what_qwen_says():
    tokenizer, messages = make_tokenizer(), [{"role": "user", "content": "a cat"}]
    thinking = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinking == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    silent = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert silent == thinking + "<think>\n\n</think>\n\n"


def test_the_same_seed_gives_the_same_bytes_in_another_process(family, checkpoint, tmp_path):
    program = "import sys; from flowroll.testing import make_checkpoint; make_checkpoint(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-c", program, family, str(tmp_path / "again")], check=True, capture_output=True)
    assert bytes_of(tmp_path / "again") == bytes_of(checkpoint)


def test_another_seed_gives_other_weights(family, checkpoint, tmp_path):
    first, second = load(checkpoint), load(make_checkpoint(family, tmp_path, seed=1))
    for name in ("transformer", "vae", "text_encoder"):
        before, after = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before), name


def test_making_a_checkpoint_leaves_the_callers_random_state_alone(family, tmp_path):
    state = torch.random.get_rng_state()
    make_checkpoint(family, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_overrides_reach_the_transformer(tmp_path):
    qwen = load(make_checkpoint("qwen_image", tmp_path / "q", num_layers=1))
    z_image = load(make_checkpoint("z_image", tmp_path / "z", n_layers=1))
    assert len(qwen.transformer.transformer_blocks) == len(z_image.transformer.layers) == 1


@pytest.mark.slow
def test_a_mid_checkpoint_has_about_100_million_parameters(family, tmp_path):
    transformer = load(make_checkpoint(family, tmp_path, size="mid"), torch.bfloat16).transformer
    assert 0.9e8 < sum(parameter.numel() for parameter in transformer.parameters()) < 1.1e8


@pytest.mark.parametrize(("field", "arguments"), [("family", ("sdxl",)), ("size", ("qwen_image", "huge"))])
def test_an_unknown_name_is_refused_with_the_known_ones(field, arguments, tmp_path):
    unchecked = getattr(make_checkpoint, "__wrapped__", make_checkpoint)
    named = dict(zip(("family", "size"), arguments, strict=False))
    with pytest.raises(InvalidRequestError, match=f"{field} must be one of") as caught:
        unchecked(**named, directory=tmp_path)
    assert caught.value.field == field


def test_a_path_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("here already")
    with pytest.raises(CheckpointError, match="directory must be a folder"):
        make_checkpoint("qwen_image", path)
